//! A function that does not exist: its whole configuration space is ours.
//!
//! Built from the same register tables as the overlay of a real one. The registers behave by their
//! masks; what a write *means* is read off them afterwards, by comparing what they said before and
//! after, and reported as [`Effects`]. So there is no state beside the registers.
//!
//! | module | decides on |
//! |---|---|
//! | `bar` | what a BAR decodes, and what of it a guest can write |
//! | `msix` | the MSI-X table, the pending bits, and when a message goes out |

mod bar;
mod builder;
mod msix;

pub use bar::{BARS, Bar, BarKind};
pub use builder::{BuildError, Builder, Identity, MsixLocation};
pub use msix::{ENTRY_BYTES, Entry, MAX_VECTORS, Message, Msix};

use crate::access::{ConfigSize, ConfigSpace, Width};
use crate::memory::MemorySpace;
use crate::registers::header::{self, command, status};
use crate::registers::{self, Register};
use crate::resource::Resource;

bitflags::bitflags! {
    /// What a write changed, for whoever routes accesses and interrupts.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    #[must_use]
    pub struct Effects: u8 {
        /// What the BARs decode: see [`Function::decoded`].
        const DECODE = 1 << 0;
        /// Whether the function may drive its interrupt line: see [`Function::intx_disabled`].
        const INTX = 1 << 1;
        /// The MSI-X control word: see [`Function::msix_control`].
        const MSIX = 1 << 2;
    }
}

/// Double words of the configuration space.
pub const DWORDS: usize = 64;

/// All that a guest wrote into a configuration space, to be kept over a restart.
pub type Registers = [u32; DWORDS];

/// An emulated function: 256 bytes of configuration space, as x86 HVM guests reach it.
#[derive(Debug)]
pub struct Function {
    space: MemorySpace,
    bars: [Option<Bar>; BARS],
    /// Offset of the MSI-X capability.
    msix: Option<u16>,
}

impl Function {
    /// Reads `data.len()` bytes. All ones behind the end of the space, where nobody answers.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, bytes) in pieces_mut(offset, data) {
            let width = width_of(bytes.len());
            let value = self.space.read(at, width).unwrap_or(u32::MAX);
            for (byte, value) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *byte = value;
            }
        }
    }

    /// Writes `data`, as far as the registers can be written.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Effects {
        let before = self.look();
        for (at, bytes) in pieces(offset, data) {
            let mut value = [0; 4];
            for (to, from) in value.iter_mut().zip(bytes) {
                *to = *from;
            }
            // Behind the end of the space nobody listens.
            let _ = self
                .space
                .write(at, width_of(bytes.len()), u32::from_le_bytes(value));
        }
        let after = self.look();
        let mut effects = Effects::empty();
        effects.set(Effects::DECODE, before.decoded != after.decoded);
        effects.set(Effects::MSIX, before.msix != after.msix);
        let changed = before.command ^ after.command;
        effects.set(Effects::INTX, changed & command::INTX_DISABLE != 0);
        effects
    }

    /// What BARs 0 to 5 decode now: nothing while decode is off in the command register, or no
    /// address is set, or a guest is asking for the size.
    pub fn decoded(&self) -> [Option<Resource>; BARS] {
        let command = self.command();
        std::array::from_fn(|index| {
            let bar = self.bars.get(index).copied().flatten()?;
            let enable = match bar.kind {
                BarKind::Io => command::IO,
                BarKind::Memory32 | BarKind::Memory64 => command::MEMORY,
            };
            if command & enable == 0 {
                return None;
            }
            let low = self.get(header::BARS.get(index)?);
            let high = match header::BARS.get(index.checked_add(1)?) {
                Some(register) if bar.is_wide() => self.get(register),
                _ => 0,
            };
            bar.decoded(low, high)
        })
    }

    /// Whether the guest keeps it from driving its interrupt line.
    pub fn intx_disabled(&self) -> bool {
        self.command() & command::INTX_DISABLE != 0
    }

    /// The MSI-X control word; 0 without the capability.
    pub fn msix_control(&self) -> u16 {
        self.msix
            .map_or(0, |base| self.get_word(&registers::msix::CONTROL.at(base)))
    }

    /// Shows in the status register whether the function asks for its interrupt line, whether or not
    /// it may drive it.
    pub fn set_interrupt_status(&self, asserted: bool) {
        let register = &header::STATUS;
        let value = self.get_word(register) & !status::INTERRUPT;
        let bit = if asserted { status::INTERRUPT } else { 0 };
        self.space
            .set(register.offset, register.width, u32::from(value | bit));
    }

    /// What a register holds. `register` counts from the start of the space.
    pub fn get(&self, register: &Register) -> u32 {
        self.space
            .read(register.offset, register.width)
            .unwrap_or(register.width.mask())
    }

    /// Sets a register as the function itself would, whatever a guest may write of it.
    pub fn set(&self, register: &Register, value: u32) {
        self.space.set(register.offset, register.width, value);
    }

    /// All registers, to be kept over a restart.
    pub fn registers(&self) -> Registers {
        std::array::from_fn(|index| {
            let offset = u16::try_from(index.saturating_mul(4)).unwrap_or(u16::MAX);
            self.space.read(offset, Width::Four).unwrap_or(u32::MAX)
        })
    }

    /// Takes on what a guest wrote before a restart: only the bits that it can write.
    pub fn restore(&mut self, registers: &Registers) -> Effects {
        let bytes: Vec<u8> = registers
            .iter()
            .flat_map(|dword| dword.to_le_bytes())
            .collect();
        self.write(0, &bytes)
    }

    fn command(&self) -> u16 {
        self.get_word(&header::COMMAND)
    }

    fn get_word(&self, register: &Register) -> u16 {
        (self.get(register) & 0xffff) as u16
    }

    fn look(&self) -> Look {
        Look {
            decoded: self.decoded(),
            command: self.command(),
            msix: self.msix_control(),
        }
    }
}

/// All of the registers that has effects.
struct Look {
    decoded: [Option<Resource>; BARS],
    command: u16,
    msix: u16,
}

/// Cuts an access into aligned ones of 1, 2 or 4 bytes, the largest possible. Bytes beyond 64 KiB
/// are left out.
fn pieces(offset: u16, data: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let (mut at, mut rest) = (Some(offset), data);
    std::iter::from_fn(move || {
        let here = at?;
        let (piece, behind) = rest.split_at_checked(piece_length(here, rest.len())?)?;
        rest = behind;
        at = here.checked_add(width_of(piece.len()).bytes());
        Some((here, piece))
    })
}

/// As [`pieces`], to be filled.
fn pieces_mut(offset: u16, data: &mut [u8]) -> impl Iterator<Item = (u16, &mut [u8])> {
    data.fill(0xff);
    let (mut at, mut rest) = (Some(offset), data);
    std::iter::from_fn(move || {
        let here = at?;
        let length = piece_length(here, rest.len())?;
        let (piece, behind) = std::mem::take(&mut rest).split_at_mut_checked(length)?;
        rest = behind;
        at = here.checked_add(width_of(piece.len()).bytes());
        Some((here, piece))
    })
}

fn piece_length(offset: u16, left: usize) -> Option<usize> {
    [4usize, 2, 1]
        .into_iter()
        .find(|length| *length <= left && usize::from(offset) & length.wrapping_sub(1) == 0)
}

const fn width_of(length: usize) -> Width {
    match length {
        4 => Width::Four,
        2 => Width::Two,
        _ => Width::One,
    }
}

/// Size of the configuration space of an emulated function.
const SIZE: ConfigSize = ConfigSize::Conventional;

#[cfg(test)]
mod tests;
