//! Text for operators.

use std::error::Error;
use std::fmt::{Display, Write};

/// An error with its causes, on one line. Control characters, which could come from a guest's nodes, are escaped.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing into a string cannot fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    printable(&text)
}

/// Things as a list in a sentence.
pub fn listed(things: impl IntoIterator<Item = impl Display>) -> String {
    let things = things.into_iter().map(|thing| thing.to_string());
    things.collect::<Vec<_>>().join(", ")
}

/// Text with control characters escaped, so that it stays on its line of the log.
pub fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_break_out_of_its_line() {
        assert_eq!(printable("a\nfake: \x1b[31m"), "a\\nfake: \\u{1b}[31m");
    }
}
