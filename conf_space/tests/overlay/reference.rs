//! The header once more, as plainly as can be, byte by byte; the overlay must agree with it.

use conf_space::Width;
use conf_space::memory::MemorySpace;
use conf_space::overlay::Overlay;
use proptest::prelude::*;

use crate::device;

/// What an ordinary guest sees of the first 64 bytes.
struct Reference {
    bytes: [u8; 64],
}

/// Offset, address and size of each BAR register of [`device::identity`], and the bits that may be
/// anything when it is sized.
const BARS: [(usize, u32, u32, u32); 7] = [
    (0x10, 0xfebc_0000, 0xfffe_0000, 0xf),
    (0x14, 0, 0, 0),
    (0x18, 0x0000_c001, 0xffff_ffe1, 0x3),
    (0x1c, 0, 0, 0),
    (0x20, 0xfe00_000c, 0x0000_000c, 0xf),
    (0x24, 0x0000_0038, 0xffff_fffe, 0),
    (0x30, 0xfeb8_0000, 0xfffc_0000, 0x7ff),
];

impl Reference {
    fn new(space: &MemorySpace) -> Self {
        use conf_space::ConfigSpace;
        let mut bytes = [0; 64];
        for (offset, byte) in (0u16..).zip(&mut bytes) {
            *byte = space.read(offset, Width::One).unwrap() as u8;
        }
        bytes[0x3c] = 0x2a;
        Self { bytes }
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let mut merged = self.bytes;
        merged[offset..offset + bytes.len()].copy_from_slice(bytes);
        let touches = |start: usize, length: usize| {
            (start..start + length).any(|byte| (offset..offset + bytes.len()).contains(&byte))
        };
        if touches(0x04, 2) {
            let write_invalidate = merged[4] & !self.bytes[4] & 0x10 != 0;
            if write_invalidate && (self.bytes[0x0c] == 0 || !self.bytes[0x0c].is_multiple_of(16)) {
                self.bytes[0x0c] = 16;
            }
            // Special cycles, VGA palette, IDSEL stepping and fast back-to-back stay the device's.
            self.bytes[4] = merged[4] & !0xa8 | self.bytes[4] & 0xa8;
            self.bytes[5] = merged[5] & !0x02 | self.bytes[5] & 0x02;
        }
        if touches(0x0c, 1) {
            self.bytes[0x0c] = merged[0x0c];
        }
        if touches(0x0f, 1)
            && (merged[0x0f] == 0x40 || merged[0x0f] & !0x40 == self.bytes[0x0f] & !0x40)
        {
            self.bytes[0x0f] = self.bytes[0x0f] & !0x40 | merged[0x0f] & 0x40;
        }
        for (start, address, size, ignored) in BARS {
            if touches(start, 4) {
                let value = u32::from_le_bytes(merged[start..start + 4].try_into().unwrap());
                let shown = if value | ignored == u32::MAX {
                    size
                } else {
                    address
                };
                self.bytes[start..start + 4].copy_from_slice(&shown.to_le_bytes());
            }
        }
    }
}

proptest! {
    #[test]
    fn the_header_behaves_as_the_reference_whatever_is_written_and_how(
        writes in prop::collection::vec(
            (
                0i32..64,
                prop::sample::select(vec![1, 2, 4]),
                prop_oneof![any::<u32>(), Just(u32::MAX), Just(0xffff_fff8)],
            ),
            1..32,
        ),
    ) {
        let space = device::nic();
        let mut overlay = Overlay::new(&device::identity(), &space).unwrap();
        let mut reference = Reference::new(&space);
        for (offset, size, value) in writes {
            let offset = offset & !(size - 1);
            overlay.write(&space, offset, size, value, &crate::ORDINARY).unwrap();
            reference.write(offset as usize, &value.to_le_bytes()[..size as usize]);
            for size in [1, 2, 4] {
                for offset in (0..64).step_by(size as usize) {
                    let mut expected = [0; 4];
                    let bytes = offset as usize..(offset + size) as usize;
                    expected[..size as usize].copy_from_slice(&reference.bytes[bytes]);
                    let read = overlay.read(&space, offset, size).unwrap();
                    prop_assert_eq!(read, u32::from_le_bytes(expected), "{:#x} {}", offset, size);
                }
            }
        }
    }
}
