//! Lists of devices as operators write them.

use std::fmt;

use thiserror::Error;

use crate::address::Bdf;

/// One entry of a list: a device, or all devices of a range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BdfPattern {
    first: Bdf,
    last: Bdf,
}

/// An entry that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{entry:?}: {problem}")]
pub struct EntryError {
    /// The entry as written.
    pub entry: String,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

impl BdfPattern {
    /// Whether the device is meant.
    pub fn matches(&self, bdf: Bdf) -> bool {
        self.first <= bdf && bdf <= self.last
    }

    /// The device, if the entry names a single one.
    pub fn exact(&self) -> Option<Bdf> {
        (self.first == self.last).then_some(self.first)
    }

    /// Those of the existing devices that are meant.
    pub fn expand<I: IntoIterator<Item = Bdf>>(
        &self,
        existing: I,
    ) -> impl Iterator<Item = Bdf> + use<I> {
        let pattern = *self;
        existing
            .into_iter()
            .filter(move |bdf| pattern.matches(*bdf))
    }
}

impl fmt::Display for BdfPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.exact() {
            Some(bdf) => write!(f, "{bdf}"),
            None => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

/// Parses a list; every entry gives a result of its own.
pub fn parse(list: &str) -> Vec<Result<BdfPattern, EntryError>> {
    list.split([',', ' ', '\n'])
        .filter(|entry| !entry.is_empty())
        .map(|entry| {
            let bdf: Bdf = entry
                .parse()
                .map_err(|error: crate::address::ParseBdfError| EntryError {
                    entry: entry.to_owned(),
                    problem: error.to_string(),
                })?;
            Ok(BdfPattern {
                first: bdf,
                last: bdf,
            })
        })
        .collect()
}
