//! What a BAR decodes: registers, some of them mapped into this program, the others behind a door.

use std::error::Error;
use std::ptr::NonNull;

/// Reaches registers one by one.
pub trait Door {
    fn read(&self, offset: u64, width: u8) -> Result<u64, Box<dyn Error>>;
    fn write(&self, offset: u64, width: u8, value: u64) -> Result<(), Box<dyn Error>>;
}

/// A part of a window that is mapped, for as long as the program runs.
pub struct Area {
    pub start: u64,
    pub size: u64,
    pub base: NonNull<u8>,
}

pub struct Window {
    pub areas: Vec<Area>,
    pub door: Box<dyn Door>,
}

impl Window {
    /// Where a register is mapped, if it is.
    fn place<T>(&self, offset: u64) -> Option<NonNull<T>> {
        let width = size_of::<T>() as u64;
        self.areas.iter().find_map(|area| {
            let within = offset.checked_sub(area.start)?;
            let fits = within.checked_add(width)? <= area.size && within.is_multiple_of(width);
            // SAFETY: the offset lies within the mapping.
            fits.then(|| unsafe { area.base.add(within as usize).cast() })
        })
    }

    pub fn read32(&self, offset: u64) -> Result<u32, Box<dyn Error>> {
        match self.place::<u32>(offset) {
            // SAFETY: within the mapping and aligned, as `place` has looked. Registers hold any value.
            Some(place) => Ok(unsafe { place.read_volatile() }),
            None => Ok(u32::try_from(self.door.read(offset, 4)?)?),
        }
    }

    pub fn write32(&self, offset: u64, value: u32) -> Result<(), Box<dyn Error>> {
        match self.place::<u32>(offset) {
            // SAFETY: within the mapping, as `place` has looked, which is no memory of this program's.
            Some(place) => unsafe { place.write_volatile(value) },
            None => self.door.write(offset, 4, value.into())?,
        }
        Ok(())
    }

    pub fn read64(&self, offset: u64) -> Result<u64, Box<dyn Error>> {
        match self.place::<u64>(offset) {
            // SAFETY: as for 32 bits.
            Some(place) => Ok(unsafe { place.read_volatile() }),
            None => self.door.read(offset, 8),
        }
    }

    pub fn write64(&self, offset: u64, value: u64) -> Result<(), Box<dyn Error>> {
        match self.place::<u64>(offset) {
            // SAFETY: as for 32 bits.
            Some(place) => unsafe { place.write_volatile(value) },
            None => self.door.write(offset, 8, value)?,
        }
        Ok(())
    }
}
