//! What the fuzz target for registers runs: any accesses to the registers of an inert device, over any
//! face.

use std::sync::Arc;

use conf_space::Width;

use super::mmio::{Board, MmioDevice, Version};
use super::{InterruptSink, Notes, Parts, RING_FEATURES};
use crate::device::{Activation, Device, DeviceKind};
use crate::features::Features;
use crate::ioreq::{Target, Window};
use crate::memory::{GuestRam, Memfd, Words};
use crate::pci::{Layout, Mode, Shape, VirtioFunction};
use crate::queue::Queue;

const QUEUE_SIZES: [u16; 2] = [16, 128];

/// Has queues and never looks at them, but at what it is told about them.
#[derive(Default)]
struct Inert {
    has: [Option<Queue>; 2],
}

impl Inert {
    fn give(&mut self, index: u16, queue: Queue) {
        let place = self.has.get_mut(usize::from(index));
        let had = place.map(|place| place.replace(queue));
        assert!(matches!(had, Some(None)), "a queue that it does not have");
    }

    fn has(&self, index: u16) -> bool {
        let place = self.has.get(usize::from(index));
        place.is_some_and(Option::is_some)
    }
}

impl Device for Inert {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _: usize, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        assert!(RING_FEATURES.contains(activation.features), "as offered");
        for (index, queue) in activation.queues {
            self.give(index, queue);
        }
    }

    fn notify(&self, queue: u16) {
        assert!(self.has(queue), "a queue that it has");
    }

    fn reset(&mut self) {
        self.has = [None, None];
    }

    fn is_reset(&self) -> bool {
        true
    }

    fn reset_queue(&mut self, queue: u16) {
        assert!(self.has(queue), "a queue that it has");
        if let Some(place) = self.has.get_mut(usize::from(queue)) {
            *place = None;
        }
    }

    fn is_queue_reset(&self, queue: u16) -> bool {
        !self.has(queue)
    }

    fn enable_queue(&mut self, index: u16, queue: Queue) {
        self.give(index, queue);
    }
}

#[derive(Debug)]
struct Nowhere;

impl InterruptSink for Nowhere {
    fn msi(&self, _: u64, _: u32) {}

    fn intx(&self, _: bool) {}
}

fn target(face: u8, words: &Words) -> Option<Box<dyn Target>> {
    let device = Inert::default();
    let notes = Notes::new(words.clone(), &device).ok()?;
    let parts = Parts {
        name: "fuzz".into(),
        device: Box::new(device),
        features: RING_FEATURES,
        ram: Arc::new(GuestRam::new(Arc::new(Memfd::new(16).ok()?), 1)),
        sink: Arc::new(Nowhere),
        notes,
    };
    let version = match face & 0xf {
        0 => Some(Version::One),
        1 => Some(Version::Two),
        _ => None,
    };
    if let Some(version) = version {
        let mut board = Board::new(0, 2);
        board.plug(0, MmioDevice::new(parts, version)).ok()?;
        return Some(Box::new(board));
    }
    let mode = match face & 0x3 {
        0 => Mode::Legacy,
        1 => Mode::Modern,
        _ => Mode::Transitional,
    };
    let layout = if face & 0x4 == 0 {
        Layout::Qemu
    } else {
        Layout::Compact
    };
    let shape = Shape {
        mode,
        layout,
        legacy_in_memory: true,
    };
    Some(Box::new(VirtioFunction::new(parts, &shape).ok()?))
}

/// The first byte says which face. Then accesses of 8 bytes: what (bits 0 to 2: the region, 7: the
/// configuration space; 3 and 4: the width; 5: a write; 6 and 7 together: a restart before it), 3 bytes of
/// offset, 4 of value.
///
/// # Panics
/// When something is wrong with the code.
pub fn accesses(data: &[u8]) {
    let Some((face, accesses)) = data.split_first() else {
        return;
    };
    let Ok(words) = Words::volatile(Notes::words(&Inert::default())) else {
        return;
    };
    let Some(mut target) = self::target(*face, &words) else {
        return;
    };
    for access in accesses.chunks_exact(8) {
        let [what, o0, o1, o2, v0, v1, v2, v3] = *access else {
            return;
        };
        if what >> 6 == 3 {
            drop(target);
            match self::target(*face, &words) {
                Some(restarted) => target = restarted,
                None => return,
            }
        }
        let window = match what & 0x7 {
            7 => Window::Config,
            bar => Window::Region(bar),
        };
        let width = match what >> 3 & 0x3 {
            0 => Width::One,
            1 => Width::Two,
            _ => Width::Four,
        };
        let offset = u32::from_le_bytes([o0, o1, o2, 0]).into();
        let value = u32::from_le_bytes([v0, v1, v2, v3]) & width.mask();
        if what & 0x20 != 0 {
            target.write(window, offset, width, value);
        } else {
            let read = target.read(window, offset, width);
            assert!(read <= width.mask(), "no more than was asked for");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    fn access() -> impl Strategy<Value = [u8; 8]> {
        let offset = prop_oneof![0u16..0x120, any::<u16>()];
        let value = prop::sample::select(vec![0u8, 1, 3, 7, 0xb, 0xf, 0x10, 0xff]);
        (any::<u8>(), offset, value, any::<u8>()).prop_map(|(what, offset, low, high)| {
            let [o0, o1] = offset.to_le_bytes();
            [what, o0, o1, 0, low, high & 0x3, 0, 0]
        })
    }

    proptest! {
        #[test]
        fn whatever_a_driver_writes_and_whenever_we_are_restarted_queues_come_and_go_in_order(
            face: u8, accesses in prop::collection::vec(access(), 0..100),
        ) {
            let mut data = vec![face];
            data.extend(accesses.into_iter().flatten());
            super::accesses(&data);
        }
    }
}
