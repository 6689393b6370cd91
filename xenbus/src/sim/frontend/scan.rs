//! Finding functions and what they have, by configuration accesses as Linux's PCI core makes them.

use std::collections::BTreeMap;

use super::interrupts::Interrupts;
use super::operations::mask;
use super::variant::Scan;
use super::{Frontend, FrontendError, Variant};
use crate::sim::BarSpace;
use crate::types::PciDevice;
use crate::xenstore::Store;

/// Offsets in a header of type 0 (PCI 3.0, 6.1).
pub(super) const ID: u16 = 0x00;
pub(super) const COMMAND: u16 = 0x04;
pub(super) const STATUS: u16 = 0x06;
const CLASS: u16 = 0x08;
const HEADER_TYPE: u16 = 0x0e;
const FIRST_BAR: u16 = 0x10;
const ROM: u16 = 0x30;
const CAPABILITIES: u16 = 0x34;
pub(super) const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;

/// Bits of the command register.
pub(super) const COMMAND_IO: u32 = 1 << 0;
pub(super) const COMMAND_MEMORY: u32 = 1 << 1;
pub(super) const COMMAND_MASTER: u32 = 1 << 2;
pub(super) const COMMAND_INTX_OFF: u32 = 1 << 10;
/// Bit of the status register.
const STATUS_CAPABILITIES: u32 = 1 << 4;
/// Bit of the header type: there are other functions.
const MULTI_FUNCTION: u32 = 1 << 7;
const HIGHEST_HEADER_TYPE: u32 = 2;

/// Address registers of a header of type 0.
const BARS: u8 = 6;
/// The number of the expansion ROM among them, as Linux counts.
const ROM_INDEX: u8 = 6;
const ROM_ENABLE: u32 = 1 << 0;
const ROM_ADDRESS: u32 = 0xffff_f800;

/// How many capabilities Linux looks at before it thinks that they are a loop.
const MOST_CAPABILITIES: usize = 48;

/// What an address register addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes the next register as well.
    Memory64,
    /// The expansion ROM.
    Rom,
}

impl BarKind {
    /// The space that its addresses are of.
    pub fn space(self) -> BarSpace {
        match self {
            Self::Io => BarSpace::Io,
            Self::Memory32 | Self::Memory64 | Self::Rom => BarSpace::Memory,
        }
    }
}

/// An address register that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Its number, 0 to 5; 6 for the ROM.
    pub index: u8,
    /// What it addresses.
    pub kind: BarKind,
    /// Where.
    pub address: u64,
    /// How many bytes.
    pub size: u64,
}

/// A function that the frontend has found.
#[derive(Debug)]
pub struct Function {
    /// Its address: virtual, but physical for [`Variant::MiniOs`].
    pub address: PciDevice,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass and interface in bits 23:0.
    pub class: u32,
    /// Header type, without the bit that says that there are other functions.
    pub header_type: u8,
    /// That bit.
    pub multi_function: bool,
    /// Interrupt pin: 1 for INTA, 0 for none.
    pub interrupt_pin: u8,
    /// Address registers.
    pub bars: Vec<Bar>,
    /// Capabilities: id and offset, in the order of the list.
    pub capabilities: Vec<(u8, u16)>,
    pub(super) interrupts: Interrupts,
}

impl Function {
    /// Offset of a capability.
    pub fn capability(&self, id: u8) -> Option<u16> {
        self.capabilities
            .iter()
            .find(|(found, _)| *found == id)
            .map(|(_, offset)| *offset)
    }
}

fn byte(value: u32) -> u8 {
    u8::try_from(value & 0xff).unwrap_or_default()
}

fn half(value: u32) -> u16 {
    u16::try_from(value & 0xffff).unwrap_or_default()
}

/// The size that an address register shows when all ones were written to it; 0 when it is not there.
fn bar_size(read_back: u64, address_bits: u64) -> u64 {
    let bits = read_back & address_bits;
    bits & bits.wrapping_neg()
}

impl Frontend {
    /// Looks for functions that are not known yet, the way the variant does.
    ///
    /// # Errors
    /// [`FrontendError::NoAnswer`], [`FrontendError::Node`], [`FrontendError::Xenstore`].
    pub fn scan(&mut self) -> Result<(), FrontendError> {
        if self.variant.traits().scan == Scan::List {
            return self.list();
        }
        for (segment, bus) in self.roots()? {
            match self.variant.traits().scan {
                Scan::BySlot => self.scan_slots(segment, bus)?,
                Scan::AllFunctions | Scan::List => self.scan_functions(segment, bus)?,
            }
        }
        Ok(())
    }

    /// The roots: segment and bus.
    fn roots(&mut self) -> Result<Vec<(u16, u8)>, FrontendError> {
        let count = match self.store.read_u32(&format!("{}/root_num", self.backend)) {
            Ok(count) => count,
            Err(error) if error.is_not_found() && self.variant.traits().root_num_optional => {
                return Ok(vec![(0, 0)]);
            }
            Err(error) => return Err(error.into()),
        };
        let mut roots = Vec::new();
        for index in 0..count {
            let path = format!("{}/root-{index}", self.backend);
            let value = self.store.read_string(&path)?;
            let root = value.split_once(':').and_then(|(segment, bus)| {
                Some((
                    u16::from_str_radix(segment, 16).ok()?,
                    u8::from_str_radix(bus, 16).ok()?,
                ))
            });
            let Some((segment, bus)) = root else {
                return Err(FrontendError::Node { path, value });
            };
            match self.variant {
                // The other segments are skipped, with a message.
                Variant::NetBsd if segment != 0 => {}
                Variant::FreeBsd if segment != self.backend_id.0 => {
                    return Err(FrontendError::Node { path, value });
                }
                _ => roots.push((segment, bus)),
            }
        }
        Ok(roots)
    }

    /// Mini-OS: what the toolstack says is there, is there.
    fn list(&mut self) -> Result<(), FrontendError> {
        let mut known = BTreeMap::new();
        for index in 0..self.device_count()? {
            if let Some(address) = self.read_device("dev", index)? {
                known.insert(address, index);
            }
        }
        self.functions
            .retain(|address, _| known.contains_key(address));
        for address in known.into_keys() {
            if !self.functions.contains_key(&address) {
                let id = self.conf_read(address, ID, 4)?;
                self.examine(address, id)?;
            }
        }
        Ok(())
    }

    fn scan_functions(&mut self, segment: u16, bus: u8) -> Result<(), FrontendError> {
        for devfn in 0..=u8::MAX {
            let address = PciDevice {
                segment,
                bus,
                devfn,
            };
            if !self.functions.contains_key(&address)
                && let Some(id) = self.probe(address)?
            {
                if self.variant == Variant::NetBsd {
                    self.turn_decoding_on(address)?;
                }
                self.examine(address, id)?;
            }
        }
        Ok(())
    }

    /// FreeBSD: the header type of function 0 decides whether there are others.
    fn scan_slots(&mut self, segment: u16, bus: u8) -> Result<(), FrontendError> {
        for slot in 0..32u8 {
            let first = PciDevice {
                segment,
                bus,
                devfn: slot << 3,
            };
            let header_type = self.read_or_ones(first, HEADER_TYPE, 1)?;
            if header_type & !MULTI_FUNCTION > HIGHEST_HEADER_TYPE {
                continue;
            }
            let functions = if header_type & MULTI_FUNCTION == 0 {
                1
            } else {
                8
            };
            for function in 0..functions {
                let address = PciDevice {
                    devfn: slot << 3 | function,
                    ..first
                };
                if let Some(id) = self.probe(address)? {
                    self.examine(address, id)?;
                }
            }
        }
        Ok(())
    }

    /// Reads as the kernels' PCI code does, for which an error is a value of all ones.
    fn read_or_ones(
        &mut self,
        function: PciDevice,
        offset: u16,
        size: u8,
    ) -> Result<u32, FrontendError> {
        match self.conf_read(function, offset, size) {
            Err(FrontendError::Refused { .. }) => Ok(mask(size)),
            other => other,
        }
    }

    /// The ids of a function, if there is one.
    fn probe(&mut self, address: PciDevice) -> Result<Option<u32>, FrontendError> {
        let id = self.read_or_ones(address, ID, 4)?;
        // Broken boards give the other three for an empty slot.
        Ok((!matches!(id, 0xffff_ffff | 0x0000_0000 | 0x0000_ffff | 0xffff_0000)).then_some(id))
    }

    /// NetBSD: a device that the backend left disabled is enabled at once.
    fn turn_decoding_on(&mut self, address: PciDevice) -> Result<(), FrontendError> {
        let mut command = self.read_or_ones(address, COMMAND, 4)?;
        if command & (COMMAND_IO | COMMAND_MEMORY) != 0 {
            return Ok(());
        }
        for index in 0..BARS {
            let bar = self.read_or_ones(address, bar_offset(index), 4)?;
            if bar & 1 != 0 {
                command |= COMMAND_IO;
            } else if bar != 0 {
                command |= COMMAND_MEMORY;
            }
        }
        self.conf_try_write(address, COMMAND, 4, command)
    }

    /// Reads what a kernel wants to know of a function that it has found.
    fn examine(&mut self, address: PciDevice, id: u32) -> Result<(), FrontendError> {
        let header_type = self.read_or_ones(address, HEADER_TYPE, 1)?;
        let class = self.read_or_ones(address, CLASS, 4)? >> 8;
        let interrupt_pin = byte(self.read_or_ones(address, INTERRUPT_PIN, 1)?);
        let capabilities = self.walk_capabilities(address)?;
        let bars = if header_type & !MULTI_FUNCTION == 0 {
            self.size_bars(address)?
        } else {
            Vec::new()
        };
        let function = Function {
            address,
            vendor: half(id),
            device: half(id >> 16),
            class,
            header_type: byte(header_type & !MULTI_FUNCTION),
            multi_function: header_type & MULTI_FUNCTION != 0,
            interrupt_pin,
            bars,
            capabilities,
            interrupts: Interrupts::None,
        };
        self.functions.insert(address, function);
        Ok(())
    }

    /// Follows the list of capabilities: id and offset of each.
    ///
    /// # Errors
    /// [`FrontendError::NoAnswer`].
    pub fn walk_capabilities(
        &mut self,
        address: PciDevice,
    ) -> Result<Vec<(u8, u16)>, FrontendError> {
        let mut found = Vec::new();
        if self.read_or_ones(address, STATUS, 2)? & STATUS_CAPABILITIES == 0 {
            return Ok(found);
        }
        let mut next = self.read_or_ones(address, CAPABILITIES, 1)?;
        for _ in 0..MOST_CAPABILITIES {
            let offset = half(next & 0xfc);
            if offset < 0x40 {
                break;
            }
            let header = self.read_or_ones(address, offset, 2)?;
            if byte(header) == 0xff {
                break;
            }
            found.push((byte(header), offset));
            next = header >> 8;
        }
        Ok(found)
    }

    /// Finds out how large the address registers' regions are: with decoding off, by writing ones, and putting everything back.
    ///
    /// # Errors
    /// [`FrontendError::NoAnswer`].
    pub fn size_bars(&mut self, address: PciDevice) -> Result<Vec<Bar>, FrontendError> {
        let command = self.read_or_ones(address, COMMAND, 2)?;
        let decoding = command & (COMMAND_IO | COMMAND_MEMORY);
        if decoding != 0 {
            self.conf_try_write(address, COMMAND, 2, command & !decoding)?;
        }
        let mut bars = Vec::new();
        let mut index = 0u8;
        while index < BARS {
            let (value, read_back) = self.size_register(address, bar_offset(index), u32::MAX)?;
            let (kind, bits) = match value & 0b111 {
                low if low & 1 != 0 => (BarKind::Io, 0xffff_fffc),
                0b100 => (BarKind::Memory64, !0xf),
                _ => (BarKind::Memory32, 0xffff_fff0),
            };
            let (mut value, mut read_back) = (u64::from(value), u64::from(read_back));
            let register = index;
            index = index.saturating_add(1);
            if kind == BarKind::Memory64 {
                let (high, high_back) = self.size_register(address, bar_offset(index), u32::MAX)?;
                value |= u64::from(high) << 32;
                read_back |= u64::from(high_back) << 32;
                index = index.saturating_add(1);
            }
            let size = bar_size(read_back, bits);
            if size != 0 {
                bars.push(Bar {
                    index: register,
                    kind,
                    address: value & bits,
                    size,
                });
            }
        }
        let (value, read_back) = self.size_register(address, ROM, !ROM_ENABLE)?;
        let bits = u64::from(ROM_ADDRESS);
        let size = bar_size(read_back.into(), bits);
        if size != 0 {
            bars.push(Bar {
                index: ROM_INDEX,
                kind: BarKind::Rom,
                address: u64::from(value) & bits,
                size,
            });
        }
        if decoding != 0 {
            self.conf_try_write(address, COMMAND, 2, command)?;
        }
        Ok(bars)
    }

    /// A register's value, and what it holds after `ones` were written. The value is put back.
    fn size_register(
        &mut self,
        address: PciDevice,
        offset: u16,
        ones: u32,
    ) -> Result<(u32, u32), FrontendError> {
        let value = self.read_or_ones(address, offset, 4)?;
        self.conf_try_write(address, offset, 4, value | ones)?;
        let read_back = self.read_or_ones(address, offset, 4)?;
        self.conf_try_write(address, offset, 4, value)?;
        // A function that does not answer has no registers.
        Ok(if value == u32::MAX {
            (0, 0)
        } else {
            (value, read_back)
        })
    }

    /// Turns a function on as a driver does: decoding of what it has, then bus mastering.
    ///
    /// # Errors
    /// [`FrontendError::Refused`], [`FrontendError::NoAnswer`].
    pub fn enable_device(&mut self, address: PciDevice) -> Result<(), FrontendError> {
        let mut bits = 0;
        for bar in self
            .functions
            .get(&address)
            .map(|function| function.bars.as_slice())
            .unwrap_or_default()
        {
            match bar.kind {
                BarKind::Io => bits |= COMMAND_IO,
                BarKind::Memory32 | BarKind::Memory64 => bits |= COMMAND_MEMORY,
                BarKind::Rom => {}
            }
        }
        for bits in [bits, COMMAND_MASTER] {
            let command = self.conf_read(address, COMMAND, 2)?;
            if command & bits != bits {
                self.conf_write(address, COMMAND, 2, command | bits)?;
            }
        }
        Ok(())
    }
}

fn bar_offset(index: u8) -> u16 {
    FIRST_BAR.saturating_add(u16::from(index).saturating_mul(4))
}
