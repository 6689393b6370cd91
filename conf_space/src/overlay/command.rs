//! The command register.
//!
//! The guest's decode bits are kept here and never turn decode off in hardware: an access to a
//! device that does not decode is an unsupported request, which can bring the host down (XSA-120).

use super::claim::View;
use super::{Identity, OpError, Operation, OverlayState};
use crate::access::ConfigSpace;
use crate::registers::header::command::{
    BUS_MASTER, FAST_BACK_TO_BACK, IDSEL_STEPPING, INTX_DISABLE, IO, MEMORY, SPECIAL_CYCLES,
    VGA_PALETTE_SNOOP, WRITE_INVALIDATE,
};
use crate::registers::header::{CACHE_LINE_SIZE, COMMAND};

/// Bits that the guest reads from the device, and writes there if its policy is permissive. All
/// others it reads as it wrote them.
const PASSED: u16 = BUS_MASTER
    | SPECIAL_CYCLES
    | WRITE_INVALIDATE
    | VGA_PALETTE_SNOOP
    | IDSEL_STEPPING
    | FAST_BACK_TO_BACK;

/// Bits that every guest controls.
pub(super) const FOLLOWS_GUEST: u16 = BUS_MASTER | WRITE_INVALIDATE;

const DECODE: u16 = IO | MEMORY;

/// Cache line size of the x86 hosts that Xen runs on: 64 bytes, in double words.
const HOST_CACHE_LINE: u32 = 64 / 4;

pub(super) const fn view(state: &OverlayState) -> View {
    View {
        from_device: PASSED as u32,
        value: (state.command & !PASSED) as u32,
    }
}

/// The decode bits that a function has use for. A virtual function has none of its own: its
/// physical function's SR-IOV capability decides.
pub(super) fn decode_bits(identity: &Identity) -> u16 {
    if identity.is_virtual_function {
        return 0;
    }
    let has = |kind: fn(&crate::Resource) -> bool| identity.resources.iter().any(kind);
    let io = if has(crate::Resource::is_io) { IO } else { 0 };
    let memory = if has(crate::Resource::is_memory) {
        MEMORY
    } else {
        0
    };
    io | memory
}

pub(super) fn write<C: ConfigSpace + ?Sized>(
    operation: &mut Operation<'_, C>,
    written: u16,
) -> Result<(), OpError> {
    let mut value = written;
    let enabled = value & DECODE != 0;
    let enabling = enabled && !operation.state.enabled;
    if enabling && let Some(power) = operation.claims.power {
        power.wake(operation)?;
    }
    let hardware = operation.read_word(COMMAND.offset)?;
    if value & !hardware & WRITE_INVALIDATE != 0 && !prepare_write_invalidate(operation)? {
        value &= !WRITE_INVALIDATE;
    }
    let mut follows = FOLLOWS_GUEST;
    if operation.policy.allow_interrupt_control && !operation.without_intx {
        follows |= (value ^ operation.state.command) & INTX_DISABLE;
    }
    if operation.policy.lets_through(COMMAND.offset, COMMAND.width) {
        follows |= PASSED;
    }
    let mut wanted = (hardware & !follows) | (value & follows);
    if enabling {
        wanted |= operation.decode;
    }
    if operation.without_intx {
        wanted |= INTX_DISABLE;
    }
    if wanted != hardware {
        operation.write_word(COMMAND.offset, wanted)?;
    }
    operation.state.command = value;
    operation.state.enabled = enabled;
    operation.effect.decode_enabled = enabling;
    Ok(())
}

/// Whether the device knows a cache line size, without which it must not write and invalidate
/// (PCI Local Bus Specification 3.0, section 6.2.4); gives it the host's if it takes it.
fn prepare_write_invalidate<C: ConfigSpace + ?Sized>(
    operation: &Operation<'_, C>,
) -> Result<bool, OpError> {
    let (offset, width) = (CACHE_LINE_SIZE.offset, CACHE_LINE_SIZE.width);
    let size = operation.space.read(offset, width)?;
    if size != 0 && size.is_multiple_of(HOST_CACHE_LINE) {
        return Ok(true);
    }
    operation.space.write(offset, width, HOST_CACHE_LINE)?;
    Ok(operation.space.read(offset, width)? == HOST_CACHE_LINE)
}
