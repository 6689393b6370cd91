//! What lies behind BARs: memory accesses find their way by address, as on a real bus; a guest's, by its window.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use conf_space::registers::header::{self, command};
use conf_space::registers::msix;
use conf_space::{ConfigSpace, Resource};
use nix::errno::Errno;
use xenbus::sim::Window;

use super::function::Function;
use super::{SimBus, lock};
use crate::host::window::window;

/// The registers behind a device's BARs: what makes it the device that it is.
pub trait Model: Send + Debug {
    /// Reads the double word at `offset`, a multiple of 4, behind a BAR.
    fn read(&mut self, bar: u8, offset: u64) -> u32;

    /// Writes it. Returns the interrupt vector that the device raises because of it.
    fn write(&mut self, bar: u8, offset: u64, value: u32) -> Option<u16>;

    /// The device is reset.
    fn reset(&mut self);
}

const NOBODY: u32 = u32::MAX;
/// Bytes of a double word, and the bits of an offset that are within one.
const WORD: u8 = 4;
const WITHIN_WORD: u64 = 0b11;

impl SimBus {
    /// Reads the double word at a host address, which is a multiple of 4. All ones where no device
    /// answers.
    pub fn memory_read(&self, address: u64) -> u32 {
        match self.locate(address) {
            Some((function, bar, offset)) => function.word(bar, offset),
            None => NOBODY,
        }
    }

    /// Writes the double word at a host address, which is a multiple of 4. Does nothing where no
    /// device answers; an MSI-X table is Xen's alone to write.
    pub fn memory_write(&self, address: u64, value: u32) {
        if let Some((function, bar, offset)) = self.locate(address) {
            self.set_word(&function, bar, offset, value);
        }
    }

    fn set_word(&self, function: &Function, bar: u8, offset: u64, value: u32) {
        if function.table_word(bar, offset).is_some() {
            return;
        }
        let raised = match &mut *lock(&function.model) {
            Some(model) => model.write(bar, offset, value),
            None => None,
        };
        if let Some(vector) = raised {
            function.raise(&self.machine, vector);
        }
    }

    /// Reads in a window of a function.
    ///
    /// # Errors
    /// EIO while the function does not decode it.
    pub(super) fn window_read(
        &self,
        function: &Arc<Function>,
        bar: u8,
        offset: u64,
        width: u8,
    ) -> io::Result<u64> {
        self.check_decoded(function, bar)?;
        let first = offset & !WITHIN_WORD;
        let mut words = u64::from(function.word(bar, first));
        if width > WORD {
            words |= u64::from(function.word(bar, first.saturating_add(WORD.into()))) << 32;
        }
        let bytes = words.to_le_bytes().into_iter();
        let bytes = bytes.skip(usize::try_from(offset & WITHIN_WORD).unwrap_or(0));
        let mut value = [0; 8];
        for (place, byte) in value.iter_mut().zip(bytes.take(width.into())) {
            *place = byte;
        }
        Ok(u64::from_le_bytes(value))
    }

    /// Writes in a window of a function. The registers here are of 4 bytes, and narrower writes do nothing.
    ///
    /// # Errors
    /// As [`SimBus::window_read`].
    pub(super) fn window_write(
        &self,
        function: &Arc<Function>,
        bar: u8,
        offset: u64,
        width: u8,
        value: u64,
    ) -> io::Result<()> {
        self.check_decoded(function, bar)?;
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        if width >= WORD {
            self.set_word(function, bar, offset, u32::from_le_bytes([a, b, c, d]));
        }
        if width > WORD {
            let next = offset.saturating_add(WORD.into());
            self.set_word(function, bar, next, u32::from_le_bytes([e, f, g, h]));
        }
        Ok(())
    }

    fn check_decoded(&self, function: &Arc<Function>, bar: u8) -> io::Result<()> {
        let decoded = function.decoded();
        let resource = decoded.get(usize::from(bar)).copied();
        match resource.filter(|resource| self.decodes(function, resource)) {
            Some(_) => Ok(()),
            None => Err(Errno::EIO.into()),
        }
    }

    /// Whether a function answers where this one of its BARs is.
    fn decodes(&self, function: &Arc<Function>, resource: &Resource) -> bool {
        let on = if resource.is_io() {
            command::IO
        } else {
            command::MEMORY
        };
        self.decoder(function).is_some_and(|decoder| {
            decoder.command() & on != 0
                && !function.is_gone()
                && !function.is_asleep()
                && !decoder.is_gone()
        })
    }

    /// Who answers at an address: the device, its BAR, and the offset behind it.
    fn locate(&self, address: u64) -> Option<(Arc<Function>, u8, u64)> {
        self.all().into_iter().find_map(|function| {
            let (bar, offset, resource) = (0u8..)
                .zip(function.decoded())
                .filter(|(_, resource)| resource.is_memory() && resource.start != 0)
                .find_map(|(bar, resource)| {
                    let offset = address.checked_sub(resource.start)?;
                    (offset < resource.size).then_some((bar, offset, resource))
                })?;
            self.decodes(&function, &resource)
                .then_some((function, bar, offset))
        })
    }
}

impl Function {
    /// What the BARs decode now: by their registers, or, for a virtual function, which has none, by
    /// its physical function's.
    fn decoded(&self) -> Vec<Resource> {
        let mut found = self.fixed.identity.resources.to_vec();
        found.truncate(header::BARS.len());
        if self.physical().is_some() {
            return found;
        }
        let register = |index: usize| {
            let bar = header::BARS.get(index)?;
            self.space.read(bar.offset, bar.width).ok()
        };
        for (index, resource) in found.iter_mut().enumerate() {
            let kind = if resource.is_io() { 0x3 } else { 0xf };
            let low = u64::from(register(index).unwrap_or(0) & !kind);
            let high = if resource.is_64_bit() {
                register(index.saturating_add(1)).map_or(0, |value| u64::from(value) << 32)
            } else {
                0
            };
            resource.start = high | low;
        }
        found
    }

    /// What guests reach of it.
    pub fn windows(&self) -> Vec<Window> {
        let bars = (0u8..).zip(self.decoded());
        bars.filter_map(|(bar, resource)| window(bar, &resource))
            .collect()
    }

    /// The double word at `offset`, a multiple of 4, behind a BAR.
    fn word(&self, bar: u8, offset: u64) -> u32 {
        if let Some(value) = self.table_word(bar, offset) {
            return value;
        }
        match &mut *lock(&self.model) {
            Some(model) => model.read(bar, offset),
            None => 0,
        }
    }

    /// The word of the MSI-X table at that place, if it is one of it.
    fn table_word(&self, bar: u8, offset: u64) -> Option<u32> {
        let (table_bar, start) = self.fixed.table?;
        let within = offset.checked_sub(start).filter(|_| bar == table_bar)?;
        let messages = lock(&self.messages);
        let entry = messages
            .table
            .get(usize::try_from(within.checked_div(msix::ENTRY_BYTES.into())?).ok()?)?;
        let [a, b, c, d, e, f, g, h] = entry.address.to_le_bytes();
        Some(match within & 0xc {
            0x0 => u32::from_le_bytes([a, b, c, d]),
            0x4 => u32::from_le_bytes([e, f, g, h]),
            0x8 => entry.data,
            _ => u32::from(entry.masked),
        })
    }
}
