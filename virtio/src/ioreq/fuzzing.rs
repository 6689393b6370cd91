//! What the fuzz target for requests runs: any bytes as requests, to devices that check what they are
//! given.

use std::sync::Arc;

use conf_space::Width;
use xenbus::PciDevice;
use xenbus::device_model::{IoRange, IoSpace};
use xenbus::ioreq::{Flags, Ioreq};
use zerocopy::FromBytes;

use super::{Claim, Placed, Request, Spaces, Target, Window};
use crate::memory::{GuestRam, Memfd};

/// Bytes of memory and of ports that the device answers.
const SIZE: u64 = 0x1000;

const FUNCTION: PciDevice = PciDevice {
    segment: 0,
    bus: 0,
    devfn: 0xf8,
};

/// A device whose memory is where the driver puts it: at the multiple of 4096 that it writes to
/// register 0x10.
#[derive(Debug, Default)]
struct Device {
    bar: u64,
}

impl Target for Device {
    fn read(&mut self, window: Window, offset: u64, width: Width) -> u32 {
        check(window, offset, width, 0);
        0x8765_4321
    }

    fn write(&mut self, window: Window, offset: u64, width: Width, value: u32) {
        check(window, offset, width, value);
        if (window, offset) == (Window::Config, 0x10) {
            self.bar = u64::from(value) & !(SIZE - 1);
        }
    }

    fn claims(&self, claims: &mut Vec<Claim>) {
        let mut claim = |range, window| claims.push(Claim { range, window });
        for (space, first, region) in [(IoSpace::Port, 0xc000, 0), (IoSpace::Memory, self.bar, 1)] {
            let last = first | (SIZE - 1);
            claim(IoRange { space, first, last }, Window::Region(region));
        }
    }
}

fn check(window: Window, offset: u64, width: Width, value: u32) {
    let size = match window {
        Window::Config => 0x1000,
        // The upper half of eight bytes that begin within.
        Window::Region(_) => SIZE + 4,
    };
    assert!(offset < size && value <= width.mask());
}

/// Requests of 32 bytes each, carried out one after the other.
///
/// # Panics
/// When something is wrong with the code.
pub fn requests(data: &[u8]) {
    let Ok(guest) = Memfd::new(4) else { return };
    guest.set_page(2, false);
    let memory = GuestRam::new(Arc::new(guest), 4);
    let mut spaces = Spaces::default();
    spaces.add(Placed {
        function: Some(FUNCTION),
        target: Box::new(Device::default()),
    });
    for bytes in data.chunks_exact(size_of::<Ioreq>()) {
        let Ok(ioreq) = Ioreq::read_from_bytes(bytes) else {
            return;
        };
        match Request::decode(&ioreq) {
            Ok(Request::Access(access)) => {
                let outcome = spaces.access(&access, 0, &memory.view());
                if ioreq.flags().contains(Flags::DATA_IS_PTR) {
                    assert_eq!(outcome.data, u64::MAX, "nothing was asked for");
                } else {
                    assert!(!outcome.fault, "memory has no part in it");
                }
            }
            Ok(Request::Invalidate) => memory.invalidate(),
            Ok(Request::TimeOffset) | Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn ioreq() -> impl Strategy<Value = Ioreq> {
        let addr = prop_oneof![
            0..0x3000u64,
            0xbff0..0xd010u64,
            (0..0x20u64).prop_map(|register| 0xf8 << 32 | register),
            any::<u64>(),
        ];
        let data = prop_oneof![0..0x5000u64, any::<u64>()];
        let count = prop_oneof![4 => 0..5u32, 1 => 0..5000u32];
        let size = prop_oneof![4 => prop::sample::select(vec![1u32, 2, 4, 8]), 1 => any::<u32>()];
        (addr, data, count, size, any::<u8>(), 0..4u8).prop_map(
            |(addr, data, count, size, flags, kind)| Ioreq {
                addr,
                data,
                count,
                size,
                flags,
                kind,
                ..Ioreq::default()
            },
        )
    }

    proptest! {
        #[test]
        fn whatever_a_cpu_asks_for_devices_get_what_is_theirs(
            asked in prop::collection::vec(ioreq(), 0..24),
        ) {
            let bytes: Vec<u8> = asked.iter().flat_map(|ioreq| ioreq.as_bytes().to_vec()).collect();
            requests(&bytes);
        }
    }
}
