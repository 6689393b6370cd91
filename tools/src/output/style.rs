//! Colours, for terminals that want them.

use std::env;
use std::io::{self, IsTerminal};

/// What a text is, and so how it looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    /// Nothing special.
    #[default]
    Plain,
    /// A heading.
    Heading,
    /// Of less weight than the rest.
    Faint,
    /// As it should be.
    Good,
    /// On its way, or worth a look.
    Notable,
    /// Not as it should be.
    Bad,
}

impl Style {
    /// Parameters of ECMA-48's "select graphic rendition".
    const fn code(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Heading => "1",
            Self::Faint => "2",
            Self::Good => "32",
            Self::Notable => "33",
            Self::Bad => "31",
        }
    }
}

/// Whether styles show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paint {
    colours: bool,
}

impl Paint {
    /// Plain text.
    #[cfg(test)]
    pub const NONE: Self = Self { colours: false };

    /// Colours on a terminal, unless `NO_COLOR` is set (no-color.org) or the terminal is a dumb one.
    pub fn for_stdout() -> Self {
        let wanted = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let able = env::var_os("TERM").is_some_and(|term| term != "dumb");
        Self {
            colours: wanted && able && io::stdout().is_terminal(),
        }
    }

    /// The text in that style.
    pub fn paint(self, style: Style, text: &str) -> String {
        if !self.colours || style == Style::Plain || text.is_empty() {
            return text.to_owned();
        }
        format!("\x1b[{}m{text}\x1b[0m", style.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_colours_text_is_text() {
        assert_eq!(Paint::NONE.paint(Style::Bad, "dead"), "dead");
    }

    #[test]
    fn colours_end_where_the_text_ends() {
        let paint = Paint { colours: true };
        assert_eq!(paint.paint(Style::Bad, "dead"), "\x1b[31mdead\x1b[0m");
        assert_eq!(paint.paint(Style::Plain, "x"), "x");
    }
}
