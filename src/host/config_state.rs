//! Saving a device's configuration space before any guest has it, and putting it back.

use std::time::Duration;

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

/// The command register in a saved configuration space.
pub fn saved_command(saved: &[u8]) -> u16 {
    let [low, high, ..] = saved_value(saved, header::COMMAND.offset, Width::Two)
        .unwrap_or(0)
        .to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// Puts back what a guest, or a reset, can have changed: power state, BARs and the rest of the header, PCI Express control registers.
/// MSI and MSI-X are switched off: whoever holds interrupts puts them back.
///
/// Registers are written only where they differ, and last the command register, to `command`, so that nothing decodes at a half-written
/// address.
pub fn restore(config: &dyn ConfigSpace, saved: &[u8], command: u16) {
    if saved.is_empty() {
        return;
    }
    let capabilities = Capabilities::walk(config, ConfigSize::Conventional).unwrap_or_default();
    let find = |id| capabilities.find(id);
    // A sleeping device takes no other writes.
    if let Some(base) = find(CapabilityId::POWER_MANAGEMENT) {
        let slept = sleeps(config, base);
        put_back(config, saved, base, &power_management::CONTROL);
        if slept {
            std::thread::sleep(D3HOT_TO_D0);
        }
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
    write_if_other(
        config,
        &header::COMMAND,
        header::COMMAND.offset,
        u32::from(command),
    );
}

/// How long nobody may touch a device that leaves D3hot (PCI Express Base Specification 6.0, section 5.9).
const D3HOT_TO_D0: Duration = Duration::from_millis(10);

/// Whether the device is in D3hot.
pub(super) fn sleeps(config: &dyn ConfigSpace, base: u16) -> bool {
    let asleep = u32::from(power_management::control::POWER_STATE);
    base.checked_add(power_management::CONTROL.offset)
        .and_then(|offset| config.read(offset, Width::Two).ok())
        .is_some_and(|control| control & asleep == asleep)
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
    if let Some(offset) = base.checked_add(register.offset)
        && let Some(before) = saved_value(saved, offset, register.width)
    {
        write_if_other(config, register, offset, before);
    }
}

fn write_if_other(config: &dyn ConfigSpace, register: &Register, offset: u16, value: u32) {
    let Ok(now) = config.read(offset, register.width) else {
        return;
    };
    // Status bits that writing one clears are left as they are.
    let wanted = value & !register.rw1c;
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

#[cfg(test)]
mod tests {
    use conf_space::memory::MemorySpace;

    use super::*;

    /// A device with PCI Express, MSI-X and power management, whose writable bits are those of the real ones.
    fn device() -> MemorySpace {
        let mut space = MemorySpace::new(ConfigSize::Conventional);
        for register in header::TYPE_0.registers {
            space.add_register(0, register);
        }
        for bar in 0..6 {
            space.make_writable(0x10 + bar * 4, Width::Four, 0xffff_f000);
        }
        space.set(header::STATUS.offset, Width::Two, 0x10);
        space.set(header::CAPABILITIES_POINTER.offset, Width::One, 0x40);
        for (base, id, next, block) in [
            (
                0x40,
                CapabilityId::POWER_MANAGEMENT,
                0x50,
                &power_management::BLOCK,
            ),
            (0x50, CapabilityId::MSI_X, 0x60, &msix::BLOCK),
            (0x60, CapabilityId::PCI_EXPRESS, 0, express::block(2)),
        ] {
            for register in block.registers {
                space.add_register(base, register);
            }
            space.set(base, Width::One, u32::from(id.0));
            space.set(base + 1, Width::One, next);
        }
        space.set(0x62, Width::Two, 2);
        space
    }

    #[test]
    fn what_a_guest_changed_is_as_before_but_for_what_others_hold() {
        let space = device();
        space.write(0x10, Width::Four, 0xfebc_0000).unwrap();
        space.write(0x04, Width::Two, 0x0003).unwrap();
        let saved = save(&space, ConfigSize::Conventional);
        for (offset, width, value) in [
            (0x04, Width::Two, 0x0147),
            (0x0c, Width::One, 0x10),
            (0x10, Width::Four, 0),
            (0x44, Width::Two, 0x3),
            (0x52, Width::Two, 0xc000),
            (0x68, Width::Two, 0x5936),
        ] {
            space.write(offset, width, value).unwrap();
        }
        restore(&space, &saved, saved_command(&saved));
        assert_eq!(save(&space, ConfigSize::Conventional), saved);
    }

    #[test]
    fn without_a_saved_configuration_nothing_is_touched() {
        let space = device();
        space.write(0x04, Width::Two, 0x0007).unwrap();
        restore(&space, &[], 0);
        assert_eq!(space.read(0x04, Width::Two).unwrap(), 7);
    }
}
