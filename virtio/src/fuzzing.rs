//! What the fuzz target for queues runs: any bytes as rings, tables and buffers, and devices that do what
//! they say.

use std::fmt::Display;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::device::Events;
use crate::features::Features;
use crate::memory::{GuestRam, Memfd};
use crate::queue::{Chain, Queue, QueueConfig, Record};
use crate::turn::Turn;
use crate::{blk, net};

const SIZE: u16 = 16;
/// Bytes of as many descriptors in their shorter form.
const RING: usize = 8 * SIZE as usize;
const DESCRIPTORS: u64 = 0x1000;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x3000;
/// What descriptors of a page number that small enough lead to.
const BUFFERS: u64 = 0x4000;
const PAGES: usize = 16;

struct Nobody;

impl Events for Nobody {
    fn used(&self, _: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self, _: &dyn Display) {}
}

/// The first byte chooses format, features and device. Then come an index for the available ring,
/// descriptors of 8 bytes each in a shorter form, and what the buffers hold.
///
/// # Errors
/// What must not be: more chains than descriptors, or one that cannot be given back.
pub fn play(data: &[u8]) -> Result<(), String> {
    let Some(([choice, index], rest)) = data.split_first_chunk() else {
        return Ok(());
    };
    let memory = Memfd::new(PAGES).map_err(|error| error.to_string())?;
    // A hole in what the guest has.
    memory.set_page(9, false);
    let ram = GuestRam::new(Arc::new(memory), 4);
    let view = ram.view();
    let mut features = Features::from_bits_retain(u64::from(choice & 3) << 28);
    features.set(Features::RING_PACKED, choice & 4 != 0);

    let write = |address: u64, bytes: &[u8]| view.write(bytes, GuestAddress(address)).is_ok();
    let (short, contents) = rest.split_at(rest.len().min(2 * RING));
    let (ring, table) = short.split_at(short.len().min(RING));
    write(DESCRIPTORS, &descriptors(ring, features));
    write(BUFFERS, &descriptors(table, features));
    write(BUFFERS.saturating_add(0x1000), contents);
    write(DRIVER, &[0, 0, index % 20, 0]);
    write(DRIVER.saturating_add(4), &available(contents));

    let mut config = QueueConfig::new(SIZE);
    (config.descriptors, config.driver, config.device) = (DESCRIPTORS, DRIVER, DEVICE);
    let record = Record::volatile(SIZE).map_err(|error| error.to_string())?;
    let queue = config.activate(&view, features, record.clone());
    let mut queue = queue.map_err(|error| error.to_string())?;

    let handler = blk::fuzz_handler();
    let mut control = net::fuzz_control();
    let mut chain = Chain::default();
    if choice & 0x18 == 0x18 {
        let mut turn = Turn::new(&mut queue, 0, &ram, &Nobody);
        let _ = control.serve(&mut turn, features | net::feature::MQ);
        return Ok(());
    }
    let mut heads = Vec::new();
    while let Ok(true) = queue.pop(&view, &mut chain) {
        if choice & 0x8 != 0
            && let Some(handler) = &handler
        {
            let _ = handler.handle(&chain);
        }
        heads.push(chain.head());
        let _ = queue.should_notify(&view);
        let _ = queue.enable_notify(&view);
    }
    if choice & 0x20 != 0 {
        // Somebody takes over.
        let again = config.activate(&view, features, record);
        queue = again.map_err(|error| error.to_string())?;
        take_again(&mut queue, heads.len())?;
    }
    if heads.len() > SIZE.into() || usize::from(queue.in_flight()) != heads.len() {
        return Err(format!("{} chains of {SIZE} descriptors", heads.len()));
    }
    for head in heads {
        let done = queue.complete(&view, head, 1);
        done.map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn take_again(queue: &mut Queue, count: usize) -> Result<(), String> {
    if usize::from(queue.in_flight()) == count {
        Ok(())
    } else {
        Err(format!("{} of {count} are left", queue.in_flight()))
    }
}

/// An available ring in which each chain comes once, but for some.
fn available(bytes: &[u8]) -> Vec<u8> {
    let heads = (0..SIZE).map(|slot| match bytes.get(usize::from(slot)) {
        Some(byte) if *byte >= 224 => u16::from(byte % 20),
        _ => slot,
    });
    heads.flat_map(u16::to_le_bytes).collect()
}

/// Descriptors from a form in which most of them make sense: a page number, an offset, a length,
/// flags, and the next one's number.
fn descriptors(short: &[u8], features: Features) -> Vec<u8> {
    let packed = features.contains(Features::RING_PACKED);
    let mut all = Vec::new();
    for bytes in short.chunks_exact(8) {
        let [page, o0, o1, l0, l1, flags, high, next] = *bytes else {
            continue;
        };
        let offset = u64::from(u16::from_le_bytes([o0, o1]));
        let address = (u64::from(page) << 12).saturating_add(offset);
        all.extend(address.to_le_bytes());
        all.extend([l0, l1, high & 1, 0]);
        // Packed descriptors are available in the first round.
        let (flags, next) = ([flags & 7, 0], [next, 0]);
        if packed {
            let [low, _] = flags;
            all.extend(next);
            all.extend([low | 0x80, 0]);
        } else {
            all.extend(flags);
            all.extend(next);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn any_rings_end_in_errors_or_in_chains_that_can_be_given_back(
            data in prop::collection::vec(any::<u8>(), 2..600),
        ) {
            prop_assert_eq!(super::play(&data), Ok(()));
        }

        #[test]
        fn rings_that_make_sense_do_so_too(
            choice in any::<u8>(),
            parts in prop::collection::vec((4..11u8, 0..2u8, 1..200u8, prop_oneof![0..4u8, Just(4)], 0..17u8), 1..32),
            contents in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut data = vec![choice, 8];
            for (page, offset, len, flags, next) in parts {
                let len = if flags & 4 != 0 { len & !15 } else { len };
                data.extend([page, 0, offset, len, 0, flags, 0, next]);
            }
            data.resize(2 + 8 * 32, 0);
            data.extend(contents);
            prop_assert_eq!(super::play(&data), Ok(()));
        }
    }
}
