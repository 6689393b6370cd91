//! What happens, line by line, with the time at which it was seen.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pcibackd::text::printable;

use crate::output;
use crate::output::style::{Paint, Style};

/// Who does something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// pcibackd.
    Daemon,
    /// `xl`'s part.
    Toolstack,
    /// The guest's kernel and its drivers.
    Guest,
    /// A device.
    Device,
}

impl Who {
    const fn name(self) -> &'static str {
        match self {
            Self::Daemon => "pcibackd",
            Self::Toolstack => "toolstack",
            Self::Guest => "guest",
            Self::Device => "device",
        }
    }
}

/// Prints lines as they come, from whichever thread.
#[derive(Debug, Clone)]
pub struct Timeline {
    start: Instant,
    paint: Paint,
    /// Keeps lines from mixing.
    printing: Arc<Mutex<()>>,
}

/// Columns of the time, of who it was, and of what happened, each with the gap after it.
const TIME: usize = 12;
const WHO: usize = 11;
const WHAT: usize = 54;

impl Timeline {
    /// Starts the clock.
    pub fn new(paint: Paint) -> Self {
        Self {
            start: Instant::now(),
            paint,
            printing: Arc::default(),
        }
    }

    /// Something has happened; `comment` says it in plain words.
    pub fn tell(&self, who: Who, what: &str, comment: &str) {
        let at = format!("{:.1} ms", self.start.elapsed().as_secs_f64() * 1000.0);
        self.print(&line(self.paint, &at, who, what, comment));
    }

    /// A part of the story begins.
    pub fn heading(&self, text: &str) {
        self.print(&format!("\n{}\n", self.paint.paint(Style::Heading, text)));
    }

    /// Anything else.
    pub fn print(&self, text: &str) {
        let _one_at_a_time = self.printing.lock().unwrap_or_else(PoisonError::into_inner);
        // The demonstration goes on, and its exit code tells, even if nobody reads on.
        let _ = output::print(text);
    }

    /// How long it has been going.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

fn line(paint: Paint, at: &str, who: Who, what: &str, comment: &str) -> String {
    let what = printable(what);
    let head = format!("{at:>width$}  {:<WHO$}", who.name(), width = TIME - 2);
    if comment.is_empty() {
        return format!("{head}{what}\n");
    }
    let comment = paint.paint(Style::Faint, &printable(comment));
    if what.chars().count() > WHAT - 2 {
        let indent = TIME + WHO + WHAT;
        return format!("{head}{what}\n{:indent$}{comment}\n", "");
    }
    format!("{head}{what:<WHAT$}{comment}\n")
}

/// A duration as persons say it.
pub fn duration(duration: Duration) -> String {
    let micros = duration.as_secs_f64() * 1e6;
    if micros < 10.0 {
        format!("{micros:.1} µs")
    } else if micros < 1000.0 {
        format!("{micros:.0} µs")
    } else {
        format!("{:.1} ms", micros / 1000.0)
    }
}

/// The middle one of several durations.
pub fn median(durations: &mut [Duration]) -> Duration {
    durations.sort_unstable();
    durations
        .get(durations.len() >> 1)
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stand_in_columns_and_a_long_one_puts_its_comment_below() {
        let short = line(Paint::NONE, "1.0 ms", Who::Guest, "reads", "why");
        assert_eq!(
            short,
            format!("    1.0 ms  guest      {:<54}why\n", "reads")
        );
        let long = line(Paint::NONE, "1.0 ms", Who::Guest, &"x".repeat(60), "why");
        let (first, second) = long.split_once('\n').unwrap();
        assert!(first.ends_with('x'));
        assert_eq!(second.trim_end().len(), short.trim_end().len());
    }

    #[test]
    fn durations_are_told_in_the_unit_that_fits() {
        assert_eq!(duration(Duration::from_nanos(12_400)), "12 µs");
        assert_eq!(duration(Duration::from_nanos(640)), "0.6 µs");
        assert_eq!(duration(Duration::from_micros(2_340)), "2.3 ms");
    }

    #[test]
    fn the_median_of_none_is_none() {
        assert_eq!(median(&mut []), Duration::ZERO);
        let mut three = [3, 1, 2].map(Duration::from_micros);
        assert_eq!(median(&mut three), Duration::from_micros(2));
    }
}
