//! Ranges of addresses, as Xen keeps them for an IOREQ server (`rangeset.c`).

use std::collections::BTreeMap;

use nix::errno::Errno;

/// Ranges that a server can have of one kind.
const MOST_RANGES: usize = 256;

/// A set of addresses. Ranges that touch are one.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// From the first address to the last.
    ranges: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Whether all of a range is in the set.
    pub fn contain(&self, first: u64, last: u64) -> bool {
        self.before(first).is_some_and(|(_, end)| last <= end)
    }

    /// The range that begins at `address` or nearest below it.
    fn before(&self, address: u64) -> Option<(u64, u64)> {
        let (start, end) = self.ranges.range(..=address).next_back()?;
        Some((*start, *end))
    }

    /// Adds a range.
    ///
    /// # Errors
    /// EINVAL when it ends before it begins, EEXIST when a part is there already, ENOMEM when there are too many.
    pub fn add(&mut self, first: u64, last: u64) -> Result<(), Errno> {
        if first > last {
            return Err(Errno::EINVAL);
        }
        if self.before(last).is_some_and(|(_, end)| end >= first) {
            return Err(Errno::EEXIST);
        }
        let (mut first, mut last) = (first, last);
        let below = self
            .before(first)
            .filter(|(_, end)| end.checked_add(1) == Some(first));
        let above = last
            .checked_add(1)
            .and_then(|next| self.ranges.get(&next).copied());
        if below.is_none() && above.is_none() && self.ranges.len() >= MOST_RANGES {
            return Err(Errno::ENOMEM);
        }
        if let Some(end) = above {
            self.ranges.remove(&last.saturating_add(1));
            last = end;
        }
        if let Some((start, _)) = below {
            first = start;
        }
        self.ranges.insert(first, last);
        Ok(())
    }

    /// Removes a range.
    ///
    /// # Errors
    /// EINVAL when it ends before it begins, ENOENT when not all of it is there.
    pub fn remove(&mut self, first: u64, last: u64) -> Result<(), Errno> {
        if first > last {
            return Err(Errno::EINVAL);
        }
        let (start, end) = self
            .before(first)
            .filter(|(_, end)| last <= *end)
            .ok_or(Errno::ENOENT)?;
        self.ranges.remove(&start);
        if start < first {
            self.ranges.insert(start, first.saturating_sub(1));
        }
        if last < end {
            self.ranges.insert(last.saturating_add(1), end);
        }
        Ok(())
    }

    /// The ranges, first and last address.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.ranges.iter().map(|(first, last)| (*first, *last))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_are_what_a_set_of_addresses_would_be(
            steps in prop::collection::vec((any::<bool>(), 0..40u64, 0..8u64), 0..60),
        ) {
            let mut ranges = Ranges::default();
            let mut model = std::collections::BTreeSet::new();
            for (add, first, length) in steps {
                let last = first + length;
                let there = (first..=last).filter(|address| model.contains(address)).count();
                if add {
                    let expected = if there == 0 { Ok(()) } else { Err(Errno::EEXIST) };
                    prop_assert_eq!(ranges.add(first, last), expected);
                    if there == 0 {
                        model.extend(first..=last);
                    }
                } else {
                    let all = there as u64 == length + 1;
                    let expected = if all { Ok(()) } else { Err(Errno::ENOENT) };
                    prop_assert_eq!(ranges.remove(first, last), expected);
                    if all {
                        model.retain(|address| *address < first || *address > last);
                    }
                }
                let found: std::collections::BTreeSet<_> =
                    ranges.iter().flat_map(|(first, last)| first..=last).collect();
                prop_assert_eq!(&found, &model);
                prop_assert_eq!(
                    ranges.contain(first, last),
                    (first..=last).all(|address| model.contains(&address))
                );
            }
        }
    }

    #[test]
    fn a_range_may_end_where_addresses_end() {
        let mut ranges = Ranges::default();
        assert_eq!(ranges.add(u64::MAX, u64::MAX), Ok(()));
        assert_eq!(ranges.add(u64::MAX - 1, u64::MAX - 1), Ok(()));
        assert_eq!(
            ranges.iter().collect::<Vec<_>>(),
            [(u64::MAX - 1, u64::MAX)]
        );
        assert_eq!(ranges.add(3, 2), Err(Errno::EINVAL));
        assert_eq!(ranges.remove(0, u64::MAX), Err(Errno::ENOENT));
        assert_eq!(ranges.remove(u64::MAX - 1, u64::MAX), Ok(()));
    }

    #[test]
    fn there_is_an_end_to_how_many_there_may_be() {
        let mut ranges = Ranges::default();
        for number in 0..256 {
            assert_eq!(ranges.add(number * 2, number * 2), Ok(()));
        }
        assert_eq!(ranges.add(1000, 1000), Err(Errno::ENOMEM));
        assert_eq!(ranges.add(1, 1), Ok(()), "joins two");
        assert_eq!(ranges.add(1000, 1000), Ok(()));
    }
}
