//! What lies behind BARs: memory accesses find their way by address, as on a real bus.

use std::fmt::Debug;
use std::sync::Arc;

use conf_space::registers::header::{self, command};
use conf_space::{ConfigSpace, Resource};

use super::function::Function;
use super::{SimBus, lock};

/// The registers behind a device's BARs: what makes it the device that it is.
pub trait Model: Send + Debug {
    /// Reads the double word at `offset`, a multiple of 4, behind a BAR.
    fn read(&mut self, bar: u8, offset: u64) -> u32;

    /// Writes it. Returns the interrupt vector that the device raises because of it.
    fn write(&mut self, bar: u8, offset: u64, value: u32) -> Option<u16>;

    /// The device is reset.
    fn reset(&mut self);
}

/// Size of an entry of the MSI-X table, in bytes.
const ENTRY: u64 = 16;
const NOBODY: u32 = u32::MAX;

impl SimBus {
    /// Reads the double word at a host address, which is a multiple of 4. All ones where no device
    /// answers.
    pub fn memory_read(&self, address: u64) -> u32 {
        let Some((function, bar, offset)) = self.locate(address) else {
            return NOBODY;
        };
        if let Some(value) = function.table_word(bar, offset) {
            return value;
        }
        match &mut *lock(&function.model) {
            Some(model) => model.read(bar, offset),
            None => 0,
        }
    }

    /// Writes the double word at a host address, which is a multiple of 4. Does nothing where no
    /// device answers; an MSI-X table is Xen's alone to write.
    pub fn memory_write(&self, address: u64, value: u32) {
        let Some((function, bar, offset)) = self.locate(address) else {
            return;
        };
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

    /// Who answers at an address: the device, its BAR, and the offset behind it.
    fn locate(&self, address: u64) -> Option<(Arc<Function>, u8, u64)> {
        self.all().into_iter().find_map(|function| {
            let (bar, offset) = (0u8..)
                .zip(function.decoded())
                .filter(|(_, resource)| resource.is_memory() && resource.start != 0)
                .find_map(|(bar, resource)| {
                    let offset = address.checked_sub(resource.start)?;
                    (offset < resource.size).then_some((bar, offset))
                })?;
            let decoder = self.decoder(&function)?;
            let decodes = decoder.command() & command::MEMORY != 0;
            (decodes && !function.is_gone() && !function.is_asleep() && !decoder.is_gone())
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
            let low = u64::from(register(index).unwrap_or(0) & !0xf);
            let high = if resource.is_64_bit() {
                register(index.saturating_add(1)).map_or(0, |value| u64::from(value) << 32)
            } else {
                0
            };
            resource.start = high | low;
        }
        found
    }

    /// The word of the MSI-X table at that place, if it is one of it.
    fn table_word(&self, bar: u8, offset: u64) -> Option<u32> {
        let (table_bar, start) = self.fixed.table?;
        let within = offset.checked_sub(start).filter(|_| bar == table_bar)?;
        let messages = lock(&self.messages);
        let entry = messages
            .table
            .get(usize::try_from(within.checked_div(ENTRY)?).ok()?)?;
        let [a, b, c, d, e, f, g, h] = entry.address.to_le_bytes();
        Some(match within & 0xc {
            0x0 => u32::from_le_bytes([a, b, c, d]),
            0x4 => u32::from_le_bytes([e, f, g, h]),
            0x8 => entry.data,
            _ => u32::from(entry.masked),
        })
    }
}
