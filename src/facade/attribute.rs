//! The files of the `pciback` directory: what each takes and says, as the kernel's driver has them.

use conf_space::address::Bdf;
use conf_space::bdf_list;
use nix::errno::Errno;

use super::driver::Driver;

/// A file of the `pciback` directory.
///
/// Of the kernel's files two are left out. `new_id` and `remove_id` would seize devices by vendor and device number, whichever is plugged in, and no toolstack that knows `new_slot` uses them. `do_flr`, which
/// `libxl` tries before `/sys/bus/pci/devices/BDF/reset`, is in some kernels' drivers only; here it makes resets go through the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attribute {
    AllowInterruptControl,
    Bind,
    DoFlr,
    IrqHandlerState,
    IrqHandlers,
    NewSlot,
    Permissive,
    Quirks,
    RemoveSlot,
    Slots,
    Unbind,
}

const WRITE: u16 = 0o200;
const READ: u16 = 0o444;

impl Attribute {
    pub const ALL: [Self; 11] = [
        Self::AllowInterruptControl,
        Self::Bind,
        Self::DoFlr,
        Self::IrqHandlerState,
        Self::IrqHandlers,
        Self::NewSlot,
        Self::Permissive,
        Self::Quirks,
        Self::RemoveSlot,
        Self::Slots,
        Self::Unbind,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::AllowInterruptControl => "allow_interrupt_control",
            Self::Bind => "bind",
            Self::DoFlr => "do_flr",
            Self::IrqHandlerState => "irq_handler_state",
            Self::IrqHandlers => "irq_handlers",
            Self::NewSlot => "new_slot",
            Self::Permissive => "permissive",
            Self::Quirks => "quirks",
            Self::RemoveSlot => "remove_slot",
            Self::Slots => "slots",
            Self::Unbind => "unbind",
        }
    }

    /// Permission bits.
    pub fn mode(self) -> u16 {
        match self {
            Self::AllowInterruptControl | Self::Permissive | Self::Quirks => READ | WRITE,
            Self::IrqHandlers | Self::Slots => READ,
            Self::Bind
            | Self::DoFlr
            | Self::IrqHandlerState
            | Self::NewSlot
            | Self::RemoveSlot
            | Self::Unbind => WRITE,
        }
    }

    pub fn is_readable(self) -> bool {
        self.mode() & READ != 0
    }

    pub fn is_writable(self) -> bool {
        self.mode() & WRITE != 0
    }

    /// The contents.
    ///
    /// # Errors
    /// EACCES for a file that is only written.
    pub fn read(self, driver: &dyn Driver) -> Result<String, Errno> {
        match self {
            Self::Slots => Ok(lines(&driver.slots())),
            Self::Permissive => Ok(lines(&driver.permissive())),
            Self::AllowInterruptControl => Ok(lines(&driver.interrupt_control())),
            Self::Quirks => Ok(driver.quirks()),
            Self::IrqHandlers => Ok(driver.irq_handlers()),
            Self::Bind
            | Self::DoFlr
            | Self::IrqHandlerState
            | Self::NewSlot
            | Self::RemoveSlot
            | Self::Unbind => Err(Errno::EACCES),
        }
    }

    /// Does what a write asks for. `existing` lists the machine's PCI devices, for wildcards.
    ///
    /// # Errors
    /// EACCES for a file that is only read, EINVAL for what is no device (ENODEV in `bind` and `unbind`, where the kernel looks it up by name), and the driver's.
    pub fn write(
        self,
        driver: &dyn Driver,
        bytes: &[u8],
        existing: impl FnOnce() -> Vec<Bdf>,
    ) -> Result<(), Errno> {
        let text = std::str::from_utf8(bytes)
            .map_err(|_| Errno::EINVAL)?
            .trim();
        let device = || text.parse::<Bdf>().map_err(|_| Errno::EINVAL);
        match self {
            Self::Bind => driver.bind(device().map_err(|_| Errno::ENODEV)?),
            Self::Unbind => driver.unbind(device().map_err(|_| Errno::ENODEV)?),
            Self::NewSlot => for_each(text, Errno::ENODEV, existing, |device| {
                driver.new_slot(device)
            }),
            Self::RemoveSlot => for_each(
                text,
                Errno::ENOENT,
                || driver.slots(),
                |device| driver.remove_slot(device),
            ),
            Self::Permissive => driver.set_permissive(device()?),
            Self::AllowInterruptControl => driver.allow_interrupt_control(device()?),
            Self::DoFlr => driver.reset(device()?),
            Self::Quirks => driver.add_quirk(text.parse().map_err(|_| Errno::EINVAL)?),
            Self::IrqHandlerState => driver.turn_irq_handler(device()?),
            Self::IrqHandlers | Self::Slots => Err(Errno::EACCES),
        }
    }
}

/// One device for each line.
fn lines(devices: &[Bdf]) -> String {
    devices.iter().map(|device| format!("{device}\n")).collect()
}

/// Does something with the device, or with all that a wildcard means. A failure does not spare the rest; the first one is told.
fn for_each(
    text: &str,
    none: Errno,
    candidates: impl FnOnce() -> Vec<Bdf>,
    mut action: impl FnMut(Bdf) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let mut entries = bdf_list::parse(text).into_iter();
    let (Some(Ok(pattern)), None) = (entries.next(), entries.next()) else {
        return Err(Errno::EINVAL);
    };
    if let Some(device) = pattern.exact() {
        return action(device);
    }
    pattern
        .expand(candidates())
        .map(action)
        .reduce(Result::and)
        .unwrap_or(Err(none))
}

#[cfg(test)]
mod tests {
    use super::super::tests::Memory;
    use super::*;

    fn devices(list: &str) -> Vec<Bdf> {
        list.split_whitespace()
            .map(|device| device.parse().unwrap())
            .collect()
    }

    fn write(attribute: Attribute, driver: &Memory, text: &str) -> Result<(), Errno> {
        attribute.write(driver, text.as_bytes(), || {
            devices("0000:00:06.0 0000:00:06.1 0000:01:00.0")
        })
    }

    #[test]
    fn slots_are_one_to_a_line() {
        let driver = Memory::default();
        assert_eq!(Attribute::Slots.read(&driver).unwrap(), "");
        for device in ["0000:03:00.1", "00:05.0", " 0001:02:1f.7\n"] {
            write(Attribute::NewSlot, &driver, device).unwrap();
        }
        let slots = "0000:00:05.0\n0000:03:00.1\n0001:02:1f.7\n";
        assert_eq!(Attribute::Slots.read(&driver).unwrap(), slots);
    }

    #[test]
    fn a_file_does_what_its_mode_says() {
        let driver = Memory::default();
        for attribute in Attribute::ALL {
            let refused = Err(Errno::EACCES);
            assert_eq!(
                attribute.read(&driver).is_ok(),
                attribute.is_readable(),
                "{attribute:?}"
            );
            assert_eq!(
                write(attribute, &driver, "00:05.0") != refused,
                attribute.is_writable(),
                "{attribute:?}"
            );
        }
    }

    #[test]
    fn a_wildcard_stands_for_what_is_there() {
        let driver = Memory::default();
        write(Attribute::NewSlot, &driver, "00:06.*").unwrap();
        assert_eq!(driver.slots(), devices("0000:00:06.0 0000:00:06.1"));
        assert_eq!(
            write(Attribute::NewSlot, &driver, "00:07.*"),
            Err(Errno::ENODEV)
        );
        write(Attribute::RemoveSlot, &driver, "0000:00:*.*").unwrap();
        assert_eq!(
            write(Attribute::RemoveSlot, &driver, "00:06.*"),
            Err(Errno::ENOENT)
        );
    }

    #[test]
    fn one_that_fails_does_not_spare_the_rest() {
        let mut done = Vec::new();
        let result = for_each(
            "00:06.*",
            Errno::ENODEV,
            || devices("0000:00:06.0 0000:00:06.1 0000:00:06.2"),
            |device| {
                done.push(device);
                if device.function() == 1 {
                    Err(Errno::EBUSY)
                } else {
                    Ok(())
                }
            },
        );
        assert_eq!(result, Err(Errno::EBUSY));
        assert_eq!(done.len(), 3);
    }

    #[test]
    fn what_is_no_device_has_the_kernels_errno() {
        let driver = Memory::default();
        for (attribute, errno) in [
            (Attribute::Bind, Errno::ENODEV),
            (Attribute::Unbind, Errno::ENODEV),
            (Attribute::NewSlot, Errno::EINVAL),
            (Attribute::RemoveSlot, Errno::EINVAL),
            (Attribute::Permissive, Errno::EINVAL),
            (Attribute::DoFlr, Errno::EINVAL),
        ] {
            for text in ["", "05.0", "0000:00:20.0", "0000:00:05.0,0000:00:06.0"] {
                assert_eq!(
                    write(attribute, &driver, text),
                    Err(errno),
                    "{text:?} to {attribute:?}"
                );
            }
            assert_eq!(
                attribute.write(&driver, b"\xff", Vec::new),
                Err(Errno::EINVAL)
            );
        }
    }
}
