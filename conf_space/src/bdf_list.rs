//! Lists of devices as operators write them.
//!
//! Entries are separated by commas or whitespace, or stand in parentheses as in the kernel's
//! `xen-pciback.hide=`; both can be mixed. All numbers are hexadecimal, the segment may be left out
//! and is then 0. An entry is one of:
//!
//! | form | means |
//! |---|---|
//! | `0000:03:00.0`, `03:00.0` | one function |
//! | `03:00.*` | all functions of a device |
//! | `03:*.*` | all devices of a bus |
//! | `03:00.0-3` | functions 0 to 3 of a device |
//! | `03:00.0-02.7` | from one function to another of the same bus, both included |
//! | `03:00.0-04:1f.7` | the same across buses of a segment |
//! | `1:0:0` | bus, device, function with colons, as old configurations have it |
//!
//! Each entry gives a result of its own: a bad one never voids the rest.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::address::{Bdf, ParseBdfError, parse_bus, parse_device, parse_function, parse_segment};
use crate::selector::ParsePathError;

/// One entry of a list: a function, or all functions of a range of addresses in one segment.
///
/// Displays in a form that parses to the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BdfPattern {
    first: Bdf,
    last: Bdf,
}

/// An entry that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{entry:?} names no device: {problem}")]
pub struct EntryError {
    /// The entry as written.
    pub entry: String,
    /// What is wrong with it.
    pub problem: EntryProblem,
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum EntryProblem {
    /// One of its addresses is none.
    #[error(transparent)]
    Address(#[from] ParseBdfError),
    /// It is meant as a place in the machine (see [`selector`](crate::selector)), and is none.
    #[error(transparent)]
    Path(#[from] ParsePathError),
    /// It has a device, but no function.
    #[error("the function is missing; for all functions write .* behind the device")]
    NoFunction,
    /// All devices are meant, but only some of their functions.
    #[error("all devices of a bus come with all their functions: write bb:*.*")]
    PartialWildcard,
    /// A wildcard stands for a segment or bus, or in a range.
    #[error("* can stand only for the function, or for device and function, and not in a range")]
    MisplacedWildcard,
    /// The range ends before it starts.
    #[error("the range ends before it starts; write the lower address first")]
    Reversed,
    /// The range spans segments.
    #[error("a range cannot span segments; write one range for each")]
    Segments,
    /// A parenthesis has no partner.
    #[error("a parenthesis is missing; write (dddd:bb:ss.f), or leave parentheses away")]
    Parenthesis,
    /// There is nothing between parentheses.
    #[error("there is nothing between the parentheses; write (dddd:bb:ss.f)")]
    Empty,
}

impl BdfPattern {
    /// The function, if the entry means a single one.
    pub fn exact(&self) -> Option<Bdf> {
        (self.first == self.last).then_some(self.first)
    }

    /// The first and the last address that are meant, in one segment.
    pub fn ends(&self) -> (Bdf, Bdf) {
        (self.first, self.last)
    }

    /// Whether the function is meant.
    pub fn matches(&self, bdf: Bdf) -> bool {
        self.first <= bdf && bdf <= self.last
    }

    /// Those of the existing functions that are meant.
    pub fn expand<I: IntoIterator<Item = Bdf>>(
        &self,
        existing: I,
    ) -> impl Iterator<Item = Bdf> + use<I> {
        let pattern = *self;
        existing
            .into_iter()
            .filter(move |bdf| pattern.matches(*bdf))
    }

    fn one(bdf: Bdf) -> Self {
        Self {
            first: bdf,
            last: bdf,
        }
    }

    fn range(first: Bdf, last: Bdf) -> Result<Self, EntryProblem> {
        if first.segment() != last.segment() {
            return Err(EntryProblem::Segments);
        }
        if last < first {
            return Err(EntryProblem::Reversed);
        }
        Ok(Self { first, last })
    }
}

impl From<Bdf> for BdfPattern {
    fn from(bdf: Bdf) -> Self {
        Self::one(bdf)
    }
}

impl fmt::Display for BdfPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last } = self;
        let (segment, bus, device) = (first.segment(), first.bus(), first.device());
        let same_bus = bus == last.bus();
        if first == last {
            write!(f, "{first}")
        } else if first.same_device(*last) && first.function() == 0 && last.function() == 7 {
            write!(f, "{segment:04x}:{bus:02x}:{device:02x}.*")
        } else if first.same_device(*last) {
            write!(f, "{first}-{:x}", last.function())
        } else if same_bus && first.devfn() == 0 && last.devfn() == 0xff {
            write!(f, "{segment:04x}:{bus:02x}:*.*")
        } else {
            write!(f, "{first}-{last}")
        }
    }
}

impl FromStr for BdfPattern {
    type Err = EntryProblem;

    fn from_str(entry: &str) -> Result<Self, EntryProblem> {
        match entry.split_once('-') {
            Some((first, last)) => parse_range(first, last),
            None if entry.contains('*') => parse_wildcard(entry),
            None => parse_one(entry).map(Self::one),
        }
    }
}

/// Parses a list. The entries come in their order; an empty list has none.
pub fn parse(list: &str) -> Vec<Result<BdfPattern, EntryError>> {
    parse_entries(list)
}

/// The same for any kind of entry.
pub(crate) fn parse_entries<T: FromStr<Err = EntryProblem>>(
    list: &str,
) -> Vec<Result<T, EntryError>> {
    let mut results = Vec::new();
    let mut rest = list.trim_start_matches(is_separator);
    while !rest.is_empty() {
        let (entry, pattern, behind) = parse_entry(rest);
        results.push(pattern.map_err(|problem| EntryError {
            entry: entry.to_owned(),
            problem,
        }));
        rest = behind.trim_start_matches(is_separator);
    }
    results
}

fn is_separator(character: char) -> bool {
    character == ',' || character.is_whitespace()
}

/// Parses the entry at the start of `list`, which is neither empty nor starts with a separator.
/// Returns it as written, its meaning, and what follows.
fn parse_entry<T: FromStr<Err = EntryProblem>>(
    list: &str,
) -> (&str, Result<T, EntryProblem>, &str) {
    if let Some(inner) = list.strip_prefix('(') {
        let end = inner.find(['(', ')']).unwrap_or(inner.len());
        let (inner, behind) = inner.split_at_checked(end).unwrap_or((inner, ""));
        return match behind.strip_prefix(')') {
            Some(behind) if inner.trim().is_empty() => ("()", Err(EntryProblem::Empty), behind),
            Some(behind) => (inner.trim(), inner.trim().parse(), behind),
            None => (inner.trim_end(), Err(EntryProblem::Parenthesis), behind),
        };
    }
    let end = list.find(|character| is_separator(character) || character == '(');
    let (entry, behind) = list
        .split_at_checked(end.unwrap_or(list.len()))
        .unwrap_or((list, ""));
    if entry.contains(')') {
        return (entry, Err(EntryProblem::Parenthesis), behind);
    }
    (entry, entry.parse(), behind)
}

fn parse_one(text: &str) -> Result<Bdf, EntryProblem> {
    if text.contains('.') {
        return Ok(text.parse()?);
    }
    // Three parts without a dot are bus, device and function of old.
    let parts: Vec<&str> = text.split(':').collect();
    match parts.as_slice() {
        [bus, device, function] => {
            let (device, function) = (parse_device(device)?, parse_function(function)?);
            Ok(address(0, parse_bus(bus)?, device, function)?)
        }
        [bus, device] if parse_bus(bus).is_ok() && parse_device(device).is_ok() => {
            Err(EntryProblem::NoFunction)
        }
        _ => Err(ParseBdfError::Form.into()),
    }
}

fn parse_wildcard(text: &str) -> Result<BdfPattern, EntryProblem> {
    let (address_text, function) = text
        .split_once('.')
        .ok_or(EntryProblem::MisplacedWildcard)?;
    let (buses, device) = address_text.rsplit_once(':').ok_or(ParseBdfError::Form)?;
    let (segment, bus) = buses.rsplit_once(':').unwrap_or(("0", buses));
    if buses.contains('*') {
        return Err(EntryProblem::MisplacedWildcard);
    }
    if function != "*" {
        return Err(EntryProblem::PartialWildcard);
    }
    let (segment, bus) = (parse_segment(segment)?, parse_bus(bus)?);
    let (first, last) = match device {
        "*" => (0, Bdf::MAX_DEVICE),
        device => {
            let device = parse_device(device)?;
            (device, device)
        }
    };
    let first = address(segment, bus, first, 0)?;
    BdfPattern::range(first, address(segment, bus, last, Bdf::MAX_FUNCTION)?)
}

/// Parses a range, whose end may leave out what it has in common with its start.
fn parse_range(first: &str, last: &str) -> Result<BdfPattern, EntryProblem> {
    if first.contains('*') || last.contains('*') {
        return Err(EntryProblem::MisplacedWildcard);
    }
    let first = parse_one(first)?;
    let (segment, bus) = (first.segment(), first.bus());
    let last = match (last.matches(':').count(), last.split_once('.')) {
        (0, None) => address(segment, bus, first.device(), parse_function(last)?)?,
        (0, Some((device, function))) => address(
            segment,
            bus,
            parse_device(device)?,
            parse_function(function)?,
        )?,
        (1, Some(_)) => {
            let last: Bdf = last.parse().map_err(EntryProblem::Address)?;
            Bdf::from_devfn(segment, last.bus(), last.devfn())
        }
        _ => parse_one(last)?,
    };
    BdfPattern::range(first, last)
}

fn address(segment: u16, bus: u8, device: u8, function: u8) -> Result<Bdf, ParseBdfError> {
    Bdf::new(segment, bus, device, function).ok_or(ParseBdfError::Form)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The list's entries as displayed, the wrong ones as their problem.
    fn read(list: &str) -> Vec<String> {
        let show = |result: Result<BdfPattern, EntryError>| match result {
            Ok(pattern) => pattern.to_string(),
            Err(error) => format!("{}!{:?}", error.entry, error.problem),
        };
        parse(list).into_iter().map(show).collect()
    }

    #[test]
    fn a_device_can_be_written_with_and_without_segment() {
        assert_eq!(read("0000:03:00.0"), ["0000:03:00.0"]);
        assert_eq!(read("3:0.1"), ["0000:03:00.1"]);
        assert_eq!(read("abcd:ef:1f.7"), ["abcd:ef:1f.7"]);
    }

    #[test]
    fn entries_are_separated_by_commas_whitespace_or_parentheses() {
        let two = ["0000:03:00.0", "0000:04:00.0"];
        for list in [
            "03:00.0,04:00.0",
            " 03:00.0 ,\t04:00.0,,\n",
            "(03:00.0)(04:00.0)",
            "( 03:00.0 ) (04:00.0)",
            "03:00.0(04:00.0)",
            "(03:00.0),04:00.0",
        ] {
            assert_eq!(read(list), two, "{list:?}");
        }
        assert!(read("").is_empty());
        assert!(read(" ,, \n").is_empty());
    }

    #[test]
    fn the_kernels_forms_are_accepted() {
        assert_eq!(
            read("(0000:03:00.0)(04:00.*)(0001:05:*.*)(06:*.*)(1:0:0)"),
            [
                "0000:03:00.0",
                "0000:04:00.*",
                "0001:05:*.*",
                "0000:06:*.*",
                "0000:01:00.0"
            ]
        );
    }

    #[test]
    fn ranges_include_both_ends() {
        assert_eq!(read("03:00.0-3"), ["0000:03:00.0-3"]);
        assert_eq!(read("03:00.0-7"), ["0000:03:00.*"]);
        assert_eq!(read("03:00.4-01.3"), ["0000:03:00.4-0000:03:01.3"]);
        assert_eq!(read("03:00.0-03:02.7"), ["0000:03:00.0-0000:03:02.7"]);
        assert_eq!(read("2:3:00.0-3:02.7"), ["0002:03:00.0-0002:03:02.7"]);
        assert_eq!(
            read("0001:03:00.0-0001:04:1f.7"),
            ["0001:03:00.0-0001:04:1f.7"]
        );
        let pattern: BdfPattern = "03:00.1-01.2".parse().unwrap();
        let meant = |text: &str| pattern.matches(text.parse().unwrap());
        assert!(meant("03:00.1") && meant("03:00.7") && meant("03:01.0") && meant("03:01.2"));
        assert!(!meant("03:00.0") && !meant("03:01.3") && !meant("0001:03:00.1"));
    }

    #[test]
    fn one_bad_entry_does_not_void_the_rest() {
        assert_eq!(
            read("03:00.0, 03:00.9, nonsense, (04:00.0)"),
            [
                "0000:03:00.0",
                "03:00.9!Address(Function)",
                "nonsense!Address(Form)",
                "0000:04:00.0"
            ]
        );
    }

    #[test]
    fn each_mistake_has_its_own_message() {
        for (list, expected) in [
            ("03:00", "03:00!NoFunction"),
            ("03:*.0", "03:*.0!PartialWildcard"),
            ("03:00.*-04:00.0", "03:00.*-04:00.0!MisplacedWildcard"),
            ("*:00.0", "*:00.0!MisplacedWildcard"),
            ("03:*", "03:*!MisplacedWildcard"),
            ("03:00.3-1", "03:00.3-1!Reversed"),
            ("0:03:00.0-1:03:00.0", "0:03:00.0-1:03:00.0!Segments"),
            ("03:00.0-", "03:00.0-!Address(Function)"),
            ("-03:00.0", "-03:00.0!Address(Form)"),
            ("03:00.0-1-2", "03:00.0-1-2!Address(Function)"),
            ("(03:00.0", "03:00.0!Parenthesis"),
            ("03:00.0)", "03:00.0)!Parenthesis"),
            ("()", "()!Empty"),
            ("20:20.0", "20:20.0!Address(Device)"),
            ("1:0:0:0", "1:0:0:0!Address(Form)"),
        ] {
            assert_eq!(read(list), [expected], "{list}");
        }
        assert_eq!(
            read("(03:00.0(04:00.0)"),
            ["03:00.0!Parenthesis", "0000:04:00.0"]
        );
    }

    #[test]
    fn messages_name_the_entry_and_what_would_be_right() {
        let messages: Vec<String> = parse("3:0 03:20.1")
            .into_iter()
            .map(|entry| entry.unwrap_err().to_string())
            .collect();
        assert_eq!(
            messages,
            [
                "\"3:0\" names no device: the function is missing; \
                 for all functions write .* behind the device",
                "\"03:20.1\" names no device: the device must be 0 to 1f in hexadecimal",
            ]
        );
    }

    #[test]
    fn expands_to_the_devices_that_exist() {
        let existing = ["03:00.0", "03:00.1", "03:01.0", "04:00.0"].map(|bdf| bdf.parse().unwrap());
        let pattern: BdfPattern = "03:00.*".parse().unwrap();
        let meant: Vec<Bdf> = pattern.expand(existing).collect();
        assert_eq!(meant, existing[..2]);
        assert_eq!(pattern.exact(), None);
        assert_eq!(BdfPattern::from(existing[3]).exact(), Some(existing[3]));
    }

    fn pattern() -> impl Strategy<Value = BdfPattern> {
        let wild = (any::<u16>(), any::<u8>(), 0u8..32).prop_flat_map(|(segment, bus, device)| {
            prop::sample::select(vec![
                format!("{segment:x}:{bus:x}:{device:x}.*"),
                format!("{segment:x}:{bus:x}:*.*"),
                format!("{segment:x}:{bus:x}:{device:x}.2-5"),
            ])
        });
        let range = (any::<u16>(), any::<[u16; 2]>()).prop_map(|(segment, ends)| {
            let [first, last] = ends.map(u16::to_be_bytes);
            let bdf = |[bus, devfn]: [u8; 2]| Bdf::from_devfn(segment, bus, devfn);
            BdfPattern::range(bdf(first).min(bdf(last)), bdf(last).max(bdf(first))).unwrap()
        });
        prop_oneof![wild.prop_map(|text| text.parse().unwrap()), range]
    }

    proptest! {
        #[test]
        fn what_is_displayed_parses_to_the_same(
            patterns in prop::collection::vec(pattern(), 0..8),
        ) {
            let displayed: Vec<String> = patterns.iter().map(ToString::to_string).collect();
            let parenthesised: String = displayed.iter().map(|one| format!("({one})")).collect();
            for list in [displayed.join(","), displayed.join(" "), parenthesised] {
                let parsed: Result<Vec<_>, _> = parse(&list).into_iter().collect();
                prop_assert_eq!(parsed.as_ref(), Ok(&patterns), "{}", list);
            }
        }

        #[test]
        fn any_text_gives_results_and_no_panic(list in any::<String>()) {
            let _ = parse(&list);
        }

        #[test]
        fn anything_that_looks_like_a_list_gives_results(list in "[0-9a-f:.*()\\-, ]{0,40}") {
            for entry in parse(&list).into_iter().flatten() {
                prop_assert_eq!(entry.to_string().parse(), Ok(entry));
            }
        }
    }
}
