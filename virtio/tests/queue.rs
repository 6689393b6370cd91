//! Both ring formats, driven by the same driver operations.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod rings;

use proptest::prelude::*;
use rings::{BUFFERS, Driver, Guest, INDIRECT, NEXT, Part, WRITE, page_of, readable, writable};
use virtio::Features;
use virtio::memory::Words;
use virtio::queue::{Chain, QueueError, Record, RingError};

const FORMATS: [Features; 2] = [Features::empty(), Features::RING_PACKED];

fn both(features: Features, test: impl Fn(&Guest, Driver)) {
    for format in FORMATS {
        test(&Guest::default(), Driver::new(0, 8, format | features));
    }
}

fn contents(chain: &Chain) -> (Vec<u8>, usize) {
    let mut reader = chain.reader();
    let mut bytes = vec![0; reader.len()];
    reader.read_exact(&mut bytes).unwrap();
    (bytes, chain.writer().len())
}

#[test]
fn a_request_goes_to_the_device_and_its_answer_to_the_driver() {
    both(Features::empty(), |guest, mut driver| {
        let mut queue = driver.queue(guest);
        let mut chain = Chain::default();
        // Three descriptors in a ring of eight, so chains lie across its end too.
        for round in 0..20u8 {
            assert!(!queue.pop(&guest.view(), &mut chain).unwrap());
            guest.write(BUFFERS, &[round; 4]);
            let parts = [
                readable(BUFFERS, 2),
                readable(BUFFERS + 2, 2),
                writable(BUFFERS + 0x2000, 10),
            ];
            let head = driver.offer(guest, &parts, None).unwrap();
            assert!(queue.pop(&guest.view(), &mut chain).unwrap());
            assert_eq!(contents(&chain), (vec![round; 4], 10));
            assert_eq!(queue.in_flight(), 1);
            chain.writer().write_all(b"answer").unwrap();
            queue.complete(&guest.view(), chain.head(), 6).unwrap();
            assert_eq!(driver.used(guest), Some((head, 6)));
            assert_eq!(driver.used(guest), None);
            assert_eq!(guest.read(BUFFERS + 0x2000, 6), b"answer");
        }
    });
}

#[test]
fn a_buffer_that_is_not_in_the_guests_memory_is_refused() {
    both(Features::empty(), |guest, mut driver| {
        guest.memory.set_page(page_of(BUFFERS) + 1, false);
        let mut queue = driver.queue(guest);
        driver.offer(guest, &[readable(BUFFERS + 0xff0, 0x20)], None);
        let error = queue.pop(&guest.view(), &mut Chain::default()).unwrap_err();
        assert!(matches!(error, RingError::Memory(_)), "{error}");
    });
}

#[test]
fn what_no_chain_may_be_is_refused() {
    type Case = (&'static str, Vec<(Part, u16)>, fn(&RingError) -> bool);
    let cases: Vec<Case> = vec![
        ("no bytes", vec![(readable(BUFFERS, 0), 0)], |e| {
            matches!(e, RingError::ZeroLength)
        }),
        (
            "readable after writable",
            vec![(writable(BUFFERS, 1), WRITE), (readable(BUFFERS, 1), 0)],
            |e| matches!(e, RingError::ReadableAfterWritable),
        ),
        ("beyond the end", vec![(readable(u64::MAX, 2), 0)], |e| {
            matches!(e, RingError::Memory(_))
        }),
        (
            "an empty table",
            vec![(readable(BUFFERS, 0), INDIRECT)],
            |e| matches!(e, RingError::IndirectLength { len: 0 }),
        ),
        (
            "an odd table",
            vec![(readable(BUFFERS, 17), INDIRECT)],
            |e| matches!(e, RingError::IndirectLength { len: 17 }),
        ),
        (
            "a table in the middle",
            vec![(readable(BUFFERS, 16), INDIRECT), (readable(BUFFERS, 1), 0)],
            |e| matches!(e, RingError::IndirectMisplaced),
        ),
        (
            "a table that is not there",
            vec![(readable(1 << 50, 16), INDIRECT)],
            |e| matches!(e, RingError::Memory(_)),
        ),
    ];
    both(Features::INDIRECT_DESC, |_, driver| {
        for (name, parts, expected) in &cases {
            let guest = Guest::default();
            let mut driver = Driver::new(0, 8, driver.features);
            let mut queue = driver.queue(&guest);
            driver.put(&guest, parts);
            let error = queue.pop(&guest.view(), &mut Chain::default()).unwrap_err();
            assert!(expected(&error), "{name}: {error:?}");
        }
    });
}

#[test]
fn a_table_is_refused_if_the_feature_was_not_negotiated_and_so_is_a_table_in_a_table() {
    both(Features::empty(), |guest, mut driver| {
        let mut queue = driver.queue(guest);
        driver.offer(guest, &[readable(BUFFERS, 1)], Some(BUFFERS + 0x1000));
        let error = queue.pop(&guest.view(), &mut Chain::default());
        assert!(matches!(error, Err(RingError::IndirectMisplaced)));
    });
    both(Features::INDIRECT_DESC, |guest, mut driver| {
        let mut queue = driver.queue(guest);
        let table = BUFFERS + 0x1000;
        driver.descriptor(guest, table, 0, readable(table, 16), INDIRECT, 0);
        driver.put(guest, &[(readable(table, 16), INDIRECT)]);
        let error = queue.pop(&guest.view(), &mut Chain::default());
        assert!(matches!(error, Err(RingError::IndirectMisplaced)));
    });
}

#[test]
fn a_huge_table_is_walked_no_further_than_its_limit() {
    let guest = Guest::default();
    let table = BUFFERS;
    for format in FORMATS {
        let mut driver = Driver::new(0, 8, format | Features::INDIRECT_DESC);
        let mut queue = driver.queue(&guest);
        // Each entry leads to itself.
        for index in 0..8 {
            driver.descriptor(&guest, table, index, readable(BUFFERS, 1), NEXT, index);
        }
        driver.put(&guest, &[(readable(table, 16 * 0xfff_ffff), INDIRECT)]);
        let error = queue.pop(&guest.view(), &mut Chain::default());
        assert!(
            matches!(error, Err(RingError::ChainTooLong { .. })),
            "{error:?}"
        );
    }
}

#[test]
fn a_table_may_have_more_descriptors_than_a_small_queue() {
    both(Features::INDIRECT_DESC, |guest, mut driver| {
        let mut queue = driver.queue(guest);
        let parts: Vec<Part> = (0..130)
            .map(|part| readable(BUFFERS + part * 8, 8))
            .collect();
        driver.offer(guest, &parts, Some(BUFFERS + 0x1_0000));
        let mut chain = Chain::default();
        assert!(queue.pop(&guest.view(), &mut chain).unwrap());
        assert_eq!(chain.reader().len(), 130 * 8);
    });
}

#[test]
fn a_split_loop_ends_after_as_many_descriptors_as_there_are() {
    let guest = Guest::default();
    let mut driver = Driver::new(0, 8, Features::empty());
    let mut queue = driver.queue(&guest);
    let base = driver.config.descriptors;
    driver.descriptor(&guest, base, 3, readable(BUFFERS, 1), NEXT, 5);
    driver.descriptor(&guest, base, 5, readable(BUFFERS, 1), NEXT, 3);
    driver.publish(&guest, 3);
    let error = queue.pop(&guest.view(), &mut Chain::default());
    assert!(matches!(error, Err(RingError::ChainTooLong { limit: 8 })));
}

#[test]
fn a_packed_chain_without_end_ends_after_as_many_descriptors_as_there_are() {
    let guest = Guest::default();
    let mut driver = Driver::new(0, 8, Features::RING_PACKED);
    let mut queue = driver.queue(&guest);
    driver.put(&guest, &[(readable(BUFFERS, 1), NEXT); 8]);
    let error = queue.pop(&guest.view(), &mut Chain::default());
    assert!(matches!(error, Err(RingError::ChainTooLong { limit: 8 })));
}

#[test]
fn descriptors_that_the_ring_does_not_have_are_refused() {
    let guest = Guest::default();
    let mut driver = Driver::new(0, 8, Features::empty());
    let mut queue = driver.queue(&guest);
    driver.publish(&guest, 8);
    let error = queue.pop(&guest.view(), &mut Chain::default());
    assert!(matches!(
        error,
        Err(RingError::NoSuchDescriptor { index: 8, .. })
    ));

    let guest = Guest::default();
    let mut driver = Driver::new(0, 8, Features::empty());
    let mut queue = driver.queue(&guest);
    let base = driver.config.descriptors;
    driver.descriptor(&guest, base, 0, readable(BUFFERS, 1), NEXT, 0xffff);
    driver.publish(&guest, 0);
    let error = queue.pop(&guest.view(), &mut Chain::default());
    assert!(matches!(
        error,
        Err(RingError::NoSuchDescriptor { index: 0xffff, .. })
    ));
}

#[test]
fn a_buffer_that_the_device_has_already_is_refused() {
    let guest = Guest::default();
    let mut driver = Driver::new(0, 8, Features::empty());
    let mut queue = driver.queue(&guest);
    let mut chain = Chain::default();
    let head = driver.offer(&guest, &[readable(BUFFERS, 1)], None).unwrap();
    driver.publish(&guest, head);
    assert!(queue.pop(&guest.view(), &mut chain).unwrap());
    let error = queue.pop(&guest.view(), &mut chain);
    assert!(matches!(error, Err(RingError::AlreadyInFlight { .. })));
}

#[test]
fn an_available_index_out_of_reach_is_refused() {
    let guest = Guest::default();
    let driver = Driver::new(0, 8, Features::empty());
    let mut queue = driver.queue(&guest);
    guest.write_u16(driver.config.driver + 2, 9);
    let error = queue.pop(&guest.view(), &mut Chain::default());
    assert!(matches!(
        error,
        Err(RingError::TooManyAvailable { size: 8 })
    ));
}

#[test]
fn completing_what_is_not_in_flight_is_an_error() {
    both(Features::empty(), |guest, driver| {
        let mut queue = driver.queue(guest);
        for head in [0, 7, 8, 0xffff] {
            let error = queue.complete(&guest.view(), head, 0);
            assert!(matches!(error, Err(RingError::NotInFlight { .. })));
        }
    });
}

#[test]
fn a_ring_that_the_guest_takes_away_is_an_error() {
    both(Features::EVENT_IDX, |guest, driver| {
        let mut queue = driver.queue(guest);
        for area in [
            driver.config.descriptors,
            driver.config.driver,
            driver.config.device,
        ] {
            guest.memory.set_page(page_of(area), false);
        }
        guest.ram.invalidate();
        let view = guest.view();
        assert!(queue.pop(&view, &mut Chain::default()).is_err());
        assert!(queue.enable_notify(&view).is_err());
        assert!(queue.should_notify(&view).is_err());
        assert!(matches!(
            driver.try_queue(guest),
            Err(QueueError::NotThere { .. })
        ));
    });
}

#[test]
fn sizes_and_places_that_make_no_queue_are_refused() {
    for format in FORMATS {
        let guest = Guest::default();
        let fails = |change: fn(&mut Driver)| {
            let mut driver = Driver::new(0, 8, format);
            change(&mut driver);
            driver.try_queue(&guest).is_err()
        };
        assert!(fails(|driver| driver.config.size = 0));
        assert!(fails(|driver| driver.config.size = 9));
        assert_eq!(fails(|driver| driver.config.size = 7), format.is_empty());
        assert!(fails(|driver| driver.config.descriptors += 8));
        assert!(fails(|driver| driver.config.driver += 1));
        assert!(fails(|driver| driver.config.device += 2));
        assert!(fails(|driver| driver.config.descriptors = 1 << 45));
        assert!(fails(|driver| driver.config.driver = u64::MAX - 1));
        assert!(fails(|driver| driver.config.device = u64::MAX - 3));
    }
}

#[test]
fn interrupts_come_as_the_drivers_flag_says() {
    both(Features::empty(), |guest, mut driver| {
        let mut queue = driver.queue(guest);
        let mut chain = Chain::default();
        for wanted in [true, false, true] {
            driver.want(guest, wanted);
            driver.offer(guest, &[writable(BUFFERS, 1)], None);
            queue.pop(&guest.view(), &mut chain).unwrap();
            queue.complete(&guest.view(), chain.head(), 0).unwrap();
            assert_eq!(queue.should_notify(&guest.view()).unwrap(), wanted);
            driver.used(guest);
        }
    });
}

#[test]
fn by_event_index_one_interrupt_comes_for_all_that_the_driver_has_not_seen() {
    both(Features::EVENT_IDX, |guest, mut driver| {
        let mut queue = driver.queue(guest);
        let mut chain = Chain::default();
        for _ in 0..30 {
            driver.want_next(guest);
            assert!(
                !queue.should_notify(&guest.view()).unwrap(),
                "nothing was completed"
            );
            for (completed, expected) in [(2, true), (1, false)] {
                for _ in 0..completed {
                    let parts = [readable(BUFFERS, 1), writable(BUFFERS, 1)];
                    driver.offer(guest, &parts, None).unwrap();
                    assert!(queue.pop(&guest.view(), &mut chain).unwrap());
                    queue.complete(&guest.view(), chain.head(), 0).unwrap();
                }
                assert_eq!(queue.should_notify(&guest.view()).unwrap(), expected);
            }
            while driver.used(guest).is_some() {}
        }
    });
}

#[test]
fn the_driver_notifies_when_the_device_waits_and_not_while_it_looks() {
    for events in [Features::empty(), Features::EVENT_IDX] {
        both(events, |guest, mut driver| {
            let mut queue = driver.queue(guest);
            let mut chain = Chain::default();
            for _ in 0..20 {
                assert!(!queue.enable_notify(&guest.view()).unwrap());
                driver.offer(guest, &[readable(BUFFERS, 1)], None).unwrap();
                assert!(driver.is_wanted(guest));
                queue.disable_notify(&guest.view()).unwrap();
                driver.offer(guest, &[readable(BUFFERS, 1)], None).unwrap();
                assert!(!driver.is_wanted(guest));
                assert!(queue.enable_notify(&guest.view()).unwrap(), "two are there");
                while queue.pop(&guest.view(), &mut chain).unwrap() {
                    queue.complete(&guest.view(), chain.head(), 0).unwrap();
                }
                while driver.used(guest).is_some() {}
            }
        });
    }
}

#[test]
fn a_chain_is_looked_up_in_the_memory_that_the_guest_has_when_the_chain_is_there() {
    both(Features::empty(), |guest, mut driver| {
        let mut queue = driver.queue(guest);
        let mut chain = Chain::default();
        let mut view = guest.view();
        // Mapped, and then given back.
        guest.write(BUFFERS, &[1]);
        guest.memory.set_page(page_of(BUFFERS), false);
        guest.ram.invalidate();
        driver.offer(guest, &[readable(BUFFERS, 1)], None).unwrap();
        let taken = queue.take(&guest.ram, &mut view, &mut chain);
        assert!(matches!(taken, Err(RingError::Memory(_))), "{taken:?}");
    });
}

/// Words of the record, whose layout `record.rs` describes.
fn completing(words: &Words, head: u16) -> u64 {
    let slots = words.get(1 + usize::from(head)) >> 32 & 0xffff;
    words.get(0) | 1 << 32 | u64::from(head) << 16 | slots << 33
}

#[test]
fn a_kill_in_the_middle_of_completing_neither_loses_a_chain_nor_gives_it_back_twice() {
    for (entry_cleared, shown) in [(false, false), (false, true), (true, true)] {
        both(Features::empty(), |guest, mut driver| {
            let words = Words::volatile(Record::words(8)).unwrap();
            driver.record = Record::new(words.clone());
            let mut queue = driver.queue(guest);
            let mut chain = Chain::default();
            let parts = [readable(BUFFERS, 1), writable(BUFFERS, 1)];
            let first = driver.offer(guest, &parts, None).unwrap();
            let second = driver.offer(guest, &parts, None).unwrap();
            assert!(queue.pop(&guest.view(), &mut chain).unwrap());
            assert!(queue.pop(&guest.view(), &mut chain).unwrap());
            // The second is completed first, so that it overwrites the first in a packed ring.
            let before: Vec<u64> = (0..words.count()).map(|word| words.get(word)).collect();
            let header = completing(&words, second);
            if shown {
                queue.complete(&guest.view(), second, 1).unwrap();
            }
            for (word, value) in before.into_iter().enumerate() {
                words.set(word, value);
            }
            if entry_cleared {
                words.set(1 + usize::from(second), 0);
            }
            words.set(0, header);
            drop(queue);

            let mut queue = driver.queue(guest);
            let mut again = Vec::new();
            while queue.pop(&guest.view(), &mut chain).unwrap() {
                again.push(chain.head());
            }
            let expected = if shown {
                vec![first]
            } else {
                vec![first, second]
            };
            assert_eq!(again, expected, "cleared {entry_cleared}, shown {shown}");
            for head in again {
                queue.complete(&guest.view(), head, 0).unwrap();
            }
            let mut seen: Vec<u16> = std::iter::from_fn(|| driver.used(guest))
                .map(|(head, _)| head)
                .collect();
            seen.sort_unstable();
            let mut all = vec![first, second];
            all.sort_unstable();
            assert_eq!(seen, all);
        });
    }
}

#[test]
fn a_record_that_was_cleared_begins_anew_and_one_that_is_too_small_is_refused() {
    both(Features::empty(), |guest, mut driver| {
        let mut queue = driver.queue(guest);
        driver.offer(guest, &[readable(BUFFERS, 1)], None).unwrap();
        assert!(queue.pop(&guest.view(), &mut Chain::default()).unwrap());
        driver.record.clear();
        assert_eq!(driver.queue(guest).in_flight(), 0);
        driver.record = Record::volatile(4).unwrap();
        assert!(matches!(
            driver.try_queue(guest),
            Err(QueueError::Record { size: 8 })
        ));
    });
}

#[test]
fn a_record_full_of_anything_is_refused_or_goes_on_within_bounds() {
    both(Features::empty(), |guest, mut driver| {
        let words = Words::volatile(Record::words(8)).unwrap();
        driver.record = Record::new(words.clone());
        for seed in 0..200u64 {
            for word in 0..words.count() {
                let value = (seed << 32 | word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                words.set(word, value ^ value >> 29);
            }
            if let Ok(mut queue) = driver.try_queue(guest) {
                while let Ok(true) = queue.pop(&guest.view(), &mut Chain::default()) {}
            }
        }
    });
}

/// What driver and device do.
#[derive(Debug, Clone)]
enum Step {
    Offer {
        parts: Vec<(u16, bool)>,
        table: bool,
    },
    Pop,
    /// The n-th of those in flight.
    Complete(usize),
    See,
    /// The device's side is gone, and a new one takes over.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let part = (1..200u16, any::<bool>());
    let offer =
        (prop::collection::vec(part, 1..5), any::<bool>()).prop_map(|(mut parts, table)| {
            parts.sort_by_key(|(_, write)| *write);
            Step::Offer { parts, table }
        });
    prop::collection::vec(
        prop_oneof![
            4 => offer,
            4 => Just(Step::Pop),
            3 => any::<usize>().prop_map(Step::Complete),
            2 => Just(Step::See),
            1 => Just(Step::Restart),
        ],
        1..120,
    )
}

/// What both formats are to have in common: the chains that were taken, what they said, and what
/// was given back. Chains are named by the order of their being offered.
fn run(steps: &[Step], features: Features, size: u16) -> Vec<String> {
    let guest = Guest::default();
    let mut driver = Driver::new(0, size, features | Features::INDIRECT_DESC);
    let mut queue = driver.queue(&guest);
    let mut chain = Chain::default();
    let mut names = std::collections::HashMap::new();
    let mut in_flight: Vec<u16> = Vec::new();
    let mut again = 0;
    let mut log = Vec::new();
    // The rings hold different numbers of chains at a time: of the same number of descriptors, though.
    for (number, step) in steps.iter().enumerate() {
        match step {
            Step::Offer { parts, table } => {
                let mut address = BUFFERS + (number as u64 % 128) * 0x2000;
                let table = table.then_some(address + 0x1000);
                let parts: Vec<Part> = parts
                    .iter()
                    .map(|(len, write)| {
                        guest.write(address, &vec![number as u8; (*len).into()]);
                        let part = Part {
                            address,
                            len: (*len).into(),
                            write: *write,
                        };
                        address += 0x100;
                        part
                    })
                    .collect();
                if let Some(head) = driver.offer(&guest, &parts, table) {
                    names.insert(head, number);
                    log.push(format!("{number} offered"));
                }
            }
            Step::Pop => {
                let taken = queue.pop(&guest.view(), &mut chain).unwrap();
                if !taken {
                    log.push("nothing".into());
                    continue;
                }
                let name = names[&chain.head()];
                let (bytes, room) = contents(&chain);
                assert!(bytes.iter().all(|byte| *byte == name as u8));
                log.push(format!(
                    "{name} taken: {} bytes, room for {room}",
                    bytes.len()
                ));
                if again > 0 {
                    // In the order in which they were taken before.
                    again -= 1;
                    let place = in_flight.len() - again - 1;
                    assert_eq!(in_flight[place], chain.head());
                } else {
                    in_flight.push(chain.head());
                }
                assert_eq!(usize::from(queue.in_flight()), in_flight.len());
            }
            Step::Complete(which) => {
                // Those that a new device has not taken again yet are not its to complete.
                let held = in_flight.len() - again;
                if held > 0 {
                    let head = in_flight.remove(which % held);
                    queue.complete(&guest.view(), head, number as u32).unwrap();
                    log.push(format!("{} completed", names[&head]));
                }
            }
            Step::See => {
                while let Some((head, len)) = driver.used(&guest) {
                    log.push(format!("{} seen, {len} bytes", names[&head]));
                }
            }
            Step::Restart => {
                queue = driver.queue(&guest);
                again = in_flight.len();
            }
        }
    }
    log
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_same_operations_give_the_same_chains_and_completions_in_both_formats(
        steps in steps(), size in 1..5u32, events in any::<bool>(),
    ) {
        let size = 1 << size;
        let events = if events { Features::EVENT_IDX } else { Features::empty() };
        prop_assert_eq!(
            run(&steps, events, size),
            run(&steps, events | Features::RING_PACKED, size)
        );
    }

    #[test]
    fn whatever_is_in_the_rings_and_tables_ends_in_an_error_or_in_accessible_chains(
        seed in prop::collection::vec(any::<u8>(), 64..512),
        flags in prop::collection::vec(0..8u16, 8),
        index in any::<u16>(),
        packed in any::<bool>(),
        features in any::<u64>(),
    ) {
        let guest = Guest::default();
        let format = if packed { Features::RING_PACKED } else { Features::empty() };
        let events = Features::from_bits_retain(features) & (Features::EVENT_IDX | Features::INDIRECT_DESC);
        let driver = Driver::new(0, 8, format | events);
        let mut queue = driver.queue(&guest);
        for area in [driver.config.descriptors, driver.config.driver, driver.config.device, BUFFERS] {
            guest.write(area, &seed);
        }
        // Descriptors that lead somewhere now and then, and rings that have something.
        for (at, flags) in flags.iter().enumerate() {
            let part = readable(BUFFERS + u64::from(*flags) * 16, u32::from(seed[at]) * 16);
            driver.descriptor(&guest, driver.config.descriptors, at as u16, part, *flags | 1 << 7, u16::from(seed[at] % 9));
        }
        guest.write_u16(driver.config.driver + 2, index % 10);
        let view = guest.view();
        let mut chain = Chain::default();
        let mut heads = Vec::new();
        for _ in 0..20 {
            match queue.pop(&view, &mut chain) {
                Ok(true) => {
                    contents(&chain);
                    heads.push(chain.head());
                }
                Ok(false) => {}
                Err(_) => break,
            }
            let _ = queue.should_notify(&view);
            let _ = queue.enable_notify(&view);
        }
        prop_assert!(heads.len() <= 8);
        for head in heads {
            queue.complete(&view, head, 1).unwrap();
        }
        prop_assert_eq!(queue.in_flight(), 0);
    }
}
