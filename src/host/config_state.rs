//! Saving a device's configuration space before any guest has it, and putting it back.

use conf_space::capabilities::{Capabilities, CapabilityId};
use conf_space::registers::{Register, express, header, msi, msix, power_management};
use conf_space::{ConfigSize, ConfigSpace, Width};

/// Reads the whole configuration space. What cannot be read is saved as zeros, and never written back.
pub fn save(config: &dyn ConfigSpace, size: ConfigSize) -> Vec<u8> {
    (0..size.bytes())
        .step_by(4)
        .flat_map(|offset| config.read(offset, Width::Four).unwrap_or(0).to_le_bytes())
        .collect()
}

/// Puts back what a guest, or a reset, can have changed: power state, BARs and the rest of the header, PCI Express control registers.
/// MSI and MSI-X are switched off: whoever holds interrupts puts them back.
///
/// Registers are written only where they differ, and the command register last, so that nothing decodes at a half-written address.
pub fn restore(config: &dyn ConfigSpace, saved: &[u8]) {
    if saved.is_empty() {
        return;
    }
    let capabilities = Capabilities::walk(config, ConfigSize::Conventional).unwrap_or_default();
    let find = |id| capabilities.find(id);
    // A sleeping device takes no other writes.
    if let Some(base) = find(CapabilityId::POWER_MANAGEMENT) {
        put_back(config, saved, base, &power_management::CONTROL);
    }
    if let Some(base) = find(CapabilityId::PCI_EXPRESS) {
        for register in express_controls(config, base) {
            put_back(config, saved, base, register);
        }
    }
    for (id, control, enable) in [
        (CapabilityId::MSI, &msi::CONTROL, msi::control::ENABLE),
        (
            CapabilityId::MSI_X,
            &msix::CONTROL,
            msix::control::ENABLE | msix::control::FUNCTION_MASK,
        ),
    ] {
        if let Some(base) = find(id) {
            clear_bits(config, base, control, u32::from(enable));
        }
    }
    for register in header::BARS.iter().chain([
        &header::EXPANSION_ROM,
        &header::CACHE_LINE_SIZE,
        &header::LATENCY_TIMER,
        &header::INTERRUPT_LINE,
    ]) {
        put_back(config, saved, 0, register);
    }
    put_back(config, saved, 0, &header::COMMAND);
}

/// The control registers that the device's PCI Express capability has.
fn express_controls(
    config: &dyn ConfigSpace,
    base: u16,
) -> impl Iterator<Item = &'static Register> {
    let version = base
        .checked_add(express::CAPABILITIES.offset)
        .and_then(|offset| config.read(offset, Width::Two).ok())
        .unwrap_or(0);
    let block = express::block(u16::try_from(version).unwrap_or(0));
    [
        &express::DEVICE_CONTROL,
        &express::LINK_CONTROL,
        &express::DEVICE_CONTROL_2,
        &express::LINK_CONTROL_2,
    ]
    .into_iter()
    .filter(move |control| {
        block
            .registers
            .iter()
            .any(|register| register.offset == control.offset)
    })
}

fn put_back(config: &dyn ConfigSpace, saved: &[u8], base: u16, register: &Register) {
    let Some(offset) = base.checked_add(register.offset) else {
        return;
    };
    let Some(before) = saved_value(saved, offset, register.width) else {
        return;
    };
    let Ok(now) = config.read(offset, register.width) else {
        return;
    };
    // Status bits that writing one clears are left as they are.
    let wanted = before & !register.rw1c;
    if now & !register.rw1c != wanted
        && let Err(error) = config.write(offset, register.width, wanted)
    {
        log::debug!("{} is not put back: {error}", register.name);
    }
}

fn clear_bits(config: &dyn ConfigSpace, base: u16, register: &Register, bits: u32) {
    let Some(offset) = base.checked_add(register.offset) else {
        return;
    };
    if let Ok(now) = config.read(offset, register.width)
        && now & bits != 0
        && let Err(error) = config.write(offset, register.width, now & !bits)
    {
        log::debug!("{} is not cleared: {error}", register.name);
    }
}

fn saved_value(saved: &[u8], offset: u16, width: Width) -> Option<u32> {
    let start = usize::from(offset);
    let bytes = saved.get(start..start.checked_add(usize::from(width.bytes()))?)?;
    Some(
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u32::from(*byte)),
    )
}
