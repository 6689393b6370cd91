//! A configuration space in memory: the hardware side of a simulated device.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::access::{AccessError, ConfigSize, ConfigSpace, Width};
use crate::registers::Register;

/// A configuration space whose bits behave by mask: writable, cleared by writing one, or read-only,
/// which all are to begin with.
///
/// Can be shared between threads; each access is atomic.
#[derive(Debug)]
pub struct MemorySpace {
    dwords: Box<[Dword]>,
}

#[derive(Debug, Default)]
struct Dword {
    value: AtomicU32,
    writable: u32,
    write_1_to_clear: u32,
}

impl MemorySpace {
    /// A space in which every bit is zero and read-only.
    pub fn new(size: ConfigSize) -> Self {
        Self {
            dwords: (0..size.bytes() / 4).map(|_| Dword::default()).collect(),
        }
    }

    /// Sets a value as hardware would, whatever the masks. Outside of the space it does nothing.
    pub fn set(&self, offset: u16, width: Width, value: u32) {
        if let Some((dword, lane)) = self.locate(offset, width) {
            let _ = dword
                .value
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                    Some((old & !lane.mask) | lane.up(value))
                });
        }
    }

    /// Makes the bits of `mask` writable.
    pub fn make_writable(&mut self, offset: u16, width: Width, mask: u32) {
        if let Some((dword, lane)) = self.locate_mut(offset, width) {
            dword.writable |= lane.up(mask);
        }
    }

    /// Makes a write of one clear each bit of `mask`.
    pub fn make_write_1_to_clear(&mut self, offset: u16, width: Width, mask: u32) {
        if let Some((dword, lane)) = self.locate_mut(offset, width) {
            dword.write_1_to_clear |= lane.up(mask);
        }
    }

    /// Makes one register of the block that starts at `base` behave as its table says, and gives it
    /// its reset value.
    pub fn add_register(&mut self, base: u16, register: &Register) {
        let offset = base.wrapping_add(register.offset);
        self.make_writable(offset, register.width, register.rw);
        self.make_write_1_to_clear(offset, register.width, register.rw1c);
        if let Some(reset) = register.reset {
            self.set(offset, register.width, reset);
        }
    }

    fn locate(&self, offset: u16, width: Width) -> Option<(&Dword, Lane)> {
        Some((
            self.dwords.get(usize::from(offset >> 2))?,
            Lane::of(offset, width)?,
        ))
    }

    fn locate_mut(&mut self, offset: u16, width: Width) -> Option<(&mut Dword, Lane)> {
        Some((
            self.dwords.get_mut(usize::from(offset >> 2))?,
            Lane::of(offset, width)?,
        ))
    }
}

/// The bits of a double word that an access touches.
#[derive(Clone, Copy)]
struct Lane {
    shift: u32,
    mask: u32,
}

impl Lane {
    fn of(offset: u16, width: Width) -> Option<Self> {
        if !width.is_aligned(offset) {
            return None;
        }
        let shift = u32::from(offset & 3).wrapping_mul(8);
        Some(Self {
            shift,
            mask: width.mask().wrapping_shl(shift),
        })
    }

    fn up(self, value: u32) -> u32 {
        value.wrapping_shl(self.shift) & self.mask
    }
}

/// What Linux answers for an access outside of the configuration space.
const EINVAL: i32 = 22;

impl ConfigSpace for MemorySpace {
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        let (dword, lane) = self
            .locate(offset, width)
            .ok_or(AccessError::Failed { errno: EINVAL })?;
        Ok((dword.value.load(Ordering::Relaxed) & lane.mask).wrapping_shr(lane.shift))
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), AccessError> {
        let (dword, lane) = self
            .locate(offset, width)
            .ok_or(AccessError::Failed { errno: EINVAL })?;
        let (value, writable) = (lane.up(value), dword.writable & lane.mask);
        let cleared = value & dword.write_1_to_clear;
        let _ = dword
            .value
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                Some(((old & !writable) | (value & writable)) & !cleared)
            });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_read_only_writable_or_cleared_by_one() {
        let mut space = MemorySpace::new(ConfigSize::Conventional);
        space.set(0x10, Width::Four, 0xf00f_1234);
        space.make_writable(0x10, Width::Two, 0x00ff);
        space.make_write_1_to_clear(0x12, Width::Two, 0xf000);
        space.write(0x10, Width::Four, 0x5fff_ffff).unwrap();
        assert_eq!(space.read(0x10, Width::Four), Ok(0xa00f_12ff));
        assert_eq!(space.read(0x13, Width::One), Ok(0xa0));
    }

    #[test]
    fn accesses_outside_of_the_space_or_unaligned_fail() {
        let space = MemorySpace::new(ConfigSize::Conventional);
        let failed = AccessError::Failed { errno: EINVAL };
        assert_eq!(space.read(0x100, Width::One), Err(failed));
        assert_eq!(space.read(0x11, Width::Two), Err(failed));
        assert_eq!(space.write(0x12, Width::Four, 0), Err(failed));
    }
}
