//! An entry point for fuzzing: one device and one guest's operations, both made of raw bytes.

use crate::access::{ConfigSize, ConfigSpace, Width};
use crate::address::Bdf;
use crate::memory::MemorySpace;
use crate::overlay::{Identity, Overlay, OverlayState, Policy};
use crate::registers::header::{COMMAND, HEADER_TYPE, command, header_type};
use crate::resource::{Resource, ResourceFlags};

/// What a guest managed that it never may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// It turned I/O or memory decode off in hardware.
    DecodeOff,
    /// It read more than it asked for.
    ReadTooMuch,
}

/// Plays operations on the overlay of a device.
///
/// | bytes of `data` | |
/// |---|---|
/// | 0 | bits: permissive, interrupt control, virtual function, conventional, stored state |
/// | 1-8 | stored state of the overlay |
/// | 9-127 | resources: start (u64), size (u64), flags (u8) |
/// | 128-383 | configuration space, all of it writable; the rest of it is zero |
/// | 384- | operations: read or write (u8), offset (i32), size (i8), value (u32) |
///
/// Missing bytes are zero. Numbers are little-endian.
///
/// # Errors
/// What the guest managed.
pub fn play(data: &[u8]) -> Result<(), Violation> {
    let mut input = Input(data);
    let [options] = input.take();
    let has = |bit: u8| options & bit != 0;
    let policy = Policy {
        permissive: has(1).into(),
        allow_interrupt_control: has(2),
    };
    let state = OverlayState::from_bits(u64::from_le_bytes(input.take()));
    let identity = Identity {
        bdf: Bdf::from_devfn(0, 0, 0),
        vendor: 0x8086,
        device: 0x10d3,
        is_virtual_function: has(4),
        interrupt_line: options,
        resources: std::array::from_fn(|_| input.resource()),
        config_size: if has(8) {
            ConfigSize::Conventional
        } else {
            ConfigSize::Extended
        },
    };
    let space = input.device();
    let Ok(mut overlay) = Overlay::new(&identity, &space) else {
        return Ok(());
    };
    if has(16) {
        overlay.set_state(state);
    }
    let decode = u32::from(command::IO | command::MEMORY);
    let on = space.read(COMMAND.offset, Width::Two).unwrap_or(0) & decode;
    while !input.0.is_empty() {
        let [write] = input.take();
        let offset = i32::from_le_bytes(input.take());
        let size = i32::from(i8::from_le_bytes(input.take()));
        let value = u32::from_le_bytes(input.take());
        if write & 1 != 0 {
            let _ = overlay.write(&space, offset, size, value, &policy);
        } else if let Ok(value) = overlay.read(&space, offset, size) {
            let mask = u32::try_from(size)
                .ok()
                .and_then(Width::from_bytes)
                .map(Width::mask);
            if value & !mask.unwrap_or(0) != 0 {
                return Err(Violation::ReadTooMuch);
            }
        }
        if space.read(COMMAND.offset, Width::Two).unwrap_or(0) & on != on {
            return Err(Violation::DecodeOff);
        }
    }
    overlay.release();
    overlay.fields().for_each(drop);
    Ok(())
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut taken = [0; N];
        for byte in &mut taken {
            if let Some((first, rest)) = self.0.split_first() {
                *byte = *first;
                self.0 = rest;
            }
        }
        taken
    }

    fn resource(&mut self) -> Resource {
        let start = u64::from_le_bytes(self.take());
        let size = u64::from_le_bytes(self.take());
        let [flags] = self.take();
        Resource {
            start,
            size,
            flags: ResourceFlags::from_bits_truncate(flags),
        }
    }

    fn device(&mut self) -> MemorySpace {
        let mut space = MemorySpace::new(ConfigSize::Extended);
        for offset in 0..ConfigSize::Conventional.bytes() {
            let [byte] = self.take();
            space.set(offset, Width::One, u32::from(byte));
            space.make_writable(offset, Width::One, 0xff);
        }
        space.set(
            HEADER_TYPE.offset,
            HEADER_TYPE.width,
            u32::from(header_type::ENDPOINT),
        );
        space
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_lead_to_a_violation(data in prop::collection::vec(any::<u8>(), 0..1024)) {
            prop_assert_eq!(play(&data), Ok(()));
        }
    }
}
