//! The status registers in which a device keeps the errors that it has reported.

use conf_space::capabilities::{Capabilities, CapabilityId, ExtendedCapabilityId};
use conf_space::registers::{Register, error_reporting, express};
use conf_space::{AccessError, ConfigSize, ConfigSpace};

/// Clears the errors that a device has logged. The kernel does not do it for a device without a driver, and as long as they stand there
/// the kernel finds them again whenever another device on the same port reports something.
///
/// # Errors
/// When the registers cannot be accessed.
pub fn clear(config: &dyn ConfigSpace, size: ConfigSize) -> Result<(), AccessError> {
    let capabilities = Capabilities::walk(config, size)?;
    if let Some(base) = capabilities.find_extended(ExtendedCapabilityId::AER) {
        for register in [
            &error_reporting::UNCORRECTABLE_STATUS,
            &error_reporting::CORRECTABLE_STATUS,
        ] {
            clear_status(config, base, register)?;
        }
    }
    if let Some(base) = capabilities.find(CapabilityId::PCI_EXPRESS) {
        clear_status(config, base, &express::DEVICE_STATUS)?;
    }
    Ok(())
}

fn clear_status(
    config: &dyn ConfigSpace,
    base: u16,
    register: &Register,
) -> Result<(), AccessError> {
    let Some(offset) = base.checked_add(register.offset) else {
        return Ok(());
    };
    let seen = config.read(offset, register.width)? & register.rw1c;
    if seen == 0 {
        return Ok(());
    }
    config.write(offset, register.width, seen)
}

#[cfg(test)]
mod tests {
    use conf_space::Width;
    use conf_space::memory::MemorySpace;
    use conf_space::registers::{capability, header};

    use super::*;

    #[test]
    fn what_was_logged_is_cleared_and_nothing_else_is_touched() {
        const AER: u16 = 0x100;
        const EXPRESS: u16 = 0x40;
        let mut space = MemorySpace::new(ConfigSize::Extended);
        for register in error_reporting::BLOCK.registers {
            space.add_register(AER, register);
        }
        for register in express::block(2).registers {
            space.add_register(EXPRESS, register);
        }
        space.set(AER, Width::Four, 0x0002_0001);
        space.set(header::STATUS.offset, Width::Two, 0x10);
        space.set(
            header::CAPABILITIES_POINTER.offset,
            Width::One,
            u32::from(EXPRESS),
        );
        space.set(EXPRESS + capability::ID.offset, Width::One, 0x10);
        space.set(EXPRESS + express::CAPABILITIES.offset, Width::Two, 2);
        space.set(EXPRESS + express::DEVICE_CONTROL.offset, Width::Two, 0x2810);
        space.set(EXPRESS + express::DEVICE_STATUS.offset, Width::Two, 0x000f);
        let severity = 0x0046_2030;
        for (register, value) in [
            (&error_reporting::UNCORRECTABLE_STATUS, 0x4000),
            (&error_reporting::UNCORRECTABLE_SEVERITY, severity),
            (&error_reporting::CORRECTABLE_STATUS, 0x2001),
        ] {
            space.set(AER + register.offset, Width::Four, value);
        }
        clear(&space, ConfigSize::Extended).unwrap();
        let read = |offset, width| space.read(offset, width).unwrap();
        for register in [
            &error_reporting::UNCORRECTABLE_STATUS,
            &error_reporting::CORRECTABLE_STATUS,
        ] {
            assert_eq!(read(AER + register.offset, Width::Four), 0);
        }
        let severity_register = AER + error_reporting::UNCORRECTABLE_SEVERITY.offset;
        assert_eq!(read(severity_register, Width::Four), severity);
        assert_eq!(read(EXPRESS + express::DEVICE_STATUS.offset, Width::Two), 0);
        assert_eq!(
            read(EXPRESS + express::DEVICE_CONTROL.offset, Width::Two),
            0x2810
        );
    }
}
