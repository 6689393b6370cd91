//! Whether all went as told.

use pcibackd::text::printable;

use crate::output::style::{Paint, Style};

/// What was claimed, and whether it was so.
#[derive(Debug, Default)]
pub struct Checks {
    done: Vec<(String, bool)>,
}

impl Checks {
    /// Notes whether something is so.
    pub fn is(&mut self, claim: &str, so: bool) {
        self.done.push((claim.to_owned(), so));
    }

    /// Notes whether something was found as it should be, and if not, what was found.
    pub fn equal<T: PartialEq + std::fmt::Debug>(&mut self, claim: &str, found: &T, wanted: &T) {
        if found == wanted {
            self.is(claim, true);
        } else {
            self.is(&format!("{claim}: {found:?} instead of {wanted:?}"), false);
        }
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        !self.done.is_empty()
    }

    /// Whether all of it was so. Of nothing at all, nothing is known.
    pub fn all_hold(&self) -> bool {
        self.any() && self.done.iter().all(|(_, so)| *so)
    }

    /// What was checked, a line each.
    pub fn report(&self, paint: Paint) -> String {
        let line = |(claim, so): &(String, bool)| {
            let (word, style) = if *so {
                ("ok    ", Style::Good)
            } else {
                ("FAILED", Style::Bad)
            };
            format!("  {}  {}\n", paint.paint(style, word), printable(claim))
        };
        self.done.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_enough_and_says_what_was_found() {
        let mut checks = Checks::default();
        assert!(!checks.all_hold());
        checks.equal("two", &2, &2);
        assert!(checks.all_hold());
        checks.equal("three", &2, &3);
        assert!(!checks.all_hold());
        let report = checks.report(Paint::NONE);
        assert_eq!(report, "  ok      two\n  FAILED  three: 2 instead of 3\n");
    }
}
