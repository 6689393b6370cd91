//! Sets of addresses as lists of ranges.

use xenbus::device_model::IoRange;

/// Sorts ranges and joins those that overlap or touch.
pub(super) fn join(ranges: &mut Vec<IoRange>) {
    ranges.retain(|range| range.first <= range.last);
    ranges.sort_unstable_by_key(|range| (range.space, range.first));
    ranges.dedup_by(|next, range| {
        let touches = next.space == range.space
            && range
                .last
                .checked_add(1)
                .is_none_or(|after| next.first <= after);
        if touches {
            range.last = range.last.max(next.last);
        }
        touches
    });
}

/// What of `range` is not in `others`, which are joined. Appended to `rest`.
pub(super) fn subtract(range: IoRange, others: &[IoRange], rest: &mut Vec<IoRange>) {
    let mut first = Some(range.first);
    let in_the_way = others.iter().filter(|other| {
        other.space == range.space && other.first <= range.last && other.last >= range.first
    });
    for other in in_the_way {
        let Some(start) = first else { return };
        if let Some(last) = other.first.checked_sub(1).filter(|last| start <= *last) {
            rest.push(IoRange {
                first: start,
                last,
                ..range
            });
        }
        first = other.last.checked_add(1);
    }
    if let Some(first) = first.filter(|first| *first <= range.last) {
        rest.push(IoRange { first, ..range });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use xenbus::device_model::IoSpace;

    use super::*;

    fn range() -> impl Strategy<Value = IoRange> {
        let space = prop_oneof![Just(IoSpace::Port), Just(IoSpace::Memory)];
        (space, 0..40u64, 0..10u64, any::<bool>()).prop_map(|(space, first, length, at_end)| {
            let first = if at_end { u64::MAX - 60 + first } else { first };
            let last = first.saturating_add(length);
            IoRange { space, first, last }
        })
    }

    fn addresses(ranges: &[IoRange]) -> BTreeSet<(IoSpace, u64)> {
        let each = |range: &IoRange| {
            let space = range.space;
            (range.first..=range.last).map(move |address| (space, address))
        };
        ranges.iter().flat_map(each).collect()
    }

    proptest! {
        #[test]
        fn joining_keeps_the_addresses_and_leaves_gaps_between_ranges(
            mut ranges in prop::collection::vec(range(), 0..12),
        ) {
            let before = addresses(&ranges);
            join(&mut ranges);
            prop_assert_eq!(addresses(&ranges), before);
            for pair in ranges.windows(2) {
                let apart = pair[0].last.checked_add(1).is_some_and(|next| next < pair[1].first);
                prop_assert!(pair[0].space < pair[1].space || apart);
            }
        }

        #[test]
        fn subtracting_leaves_what_is_in_the_one_and_not_in_the_others(
            from in range(),
            mut others in prop::collection::vec(range(), 0..12),
        ) {
            join(&mut others);
            let mut rest = Vec::new();
            subtract(from, &others, &mut rest);
            let others = addresses(&others);
            let expected: BTreeSet<_> =
                addresses(&[from]).difference(&others).copied().collect();
            prop_assert_eq!(addresses(&rest), expected);
        }
    }
}
