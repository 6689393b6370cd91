//! The files of the `pciback` directory: what each takes and says, as the kernel's driver has them.

use conf_space::address::Bdf;
use conf_space::bdf_list;
use nix::errno::Errno;

use super::driver::{Driver, Quirk};

/// A file of the `pciback` directory.
///
/// Of the kernel's files three are left out. `irq_handler_state` turns the kernel's own INTx handler on and off, which does not exist here. `new_id` and
/// `remove_id` would seize devices by vendor and device number, whichever is plugged in, and no toolstack that knows `new_slot` uses them. `do_flr`, which
/// `libxl` tries before `/sys/bus/pci/devices/BDF/reset`, is in some kernels' drivers only; here it makes resets go through the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attribute {
    AllowInterruptControl,
    Bind,
    DoFlr,
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
    pub const ALL: [Self; 10] = [
        Self::AllowInterruptControl,
        Self::Bind,
        Self::DoFlr,
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
            Self::Bind | Self::DoFlr | Self::NewSlot | Self::RemoveSlot | Self::Unbind => WRITE,
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
            Self::Bind | Self::DoFlr | Self::NewSlot | Self::RemoveSlot | Self::Unbind => {
                Err(Errno::EACCES)
            }
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
            Self::Quirks => driver.add_quirk(Quirk::parse(text).ok_or(Errno::EINVAL)?),
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
