//! What the facade asks of the daemon.

use conf_space::address::Bdf;
use nix::errno::Errno;

/// The backend behind `/sys/bus/pci/drivers/pciback`. One method for each thing that a toolstack can read there or ask for.
///
/// The lists (`seized`, `slots`, `permissive`, `interrupt_control`, `quirks`) are asked for while a directory is looked up: they answer from memory and
/// never wait for a slow operation. `bind`, `unbind`, `reset` and the other requests may take as long as the hardware does; each runs on a thread of the
/// facade's pool, several at a time, and the writer gets the errno.
pub trait Driver: Send + Sync + 'static {
    /// The devices that the backend holds: each is a link in the directory, and so *assignable* for `xl`.
    fn seized(&self) -> Vec<Bdf>;

    /// The devices that it holds or will hold once they are bound, as `slots` lists them.
    fn slots(&self) -> Vec<Bdf>;

    /// Takes a device into the slots. Does not bind it. One that is there already is no error.
    ///
    /// # Errors
    /// ENOMEM when the list cannot take it.
    fn new_slot(&self, device: Bdf) -> Result<(), Errno>;

    /// Takes a device from the slots. Does not unbind it.
    ///
    /// # Errors
    /// ENOENT when it is not there.
    fn remove_slot(&self, device: Bdf) -> Result<(), Errno>;

    /// Seizes a device that is in the slots.
    ///
    /// # Errors
    /// ENODEV when there is no such device or it is in no slot, and whatever stands in the way of seizing it.
    fn bind(&self, device: Bdf) -> Result<(), Errno>;

    /// Gives a seized device back. Its slot stays.
    ///
    /// # Errors
    /// ENODEV when it is not seized, and whatever stands in the way.
    fn unbind(&self, device: Bdf) -> Result<(), Errno>;

    /// The devices whose guest may write every register.
    fn permissive(&self) -> Vec<Bdf>;

    /// Lets the guest that has the device write every register of it.
    ///
    /// # Errors
    /// ENODEV when it is not seized.
    fn set_permissive(&self, device: Bdf) -> Result<(), Errno>;

    /// The devices whose interrupt enable bits a device model in a stub domain may set through configuration space.
    fn interrupt_control(&self) -> Vec<Bdf>;

    /// Allows that for a device, until its guest gives it back.
    ///
    /// # Errors
    /// ENODEV when it is not seized.
    fn allow_interrupt_control(&self, device: Bdf) -> Result<(), Errno>;

    /// The text of `quirks`: for each device its address and IDs, then the fields that are laid over its configuration space.
    fn quirks(&self) -> String;

    /// Lays one more field over a device's configuration space.
    ///
    /// # Errors
    /// ENODEV when it is not seized.
    fn add_quirk(&self, quirk: Quirk) -> Result<(), Errno>;

    /// The text of `irq_handlers`: the backend's own handlers for shared INTx lines. A backend in user space has none, Xen delivers the interrupt to the
    /// guest alone: nothing is listed.
    fn irq_handlers(&self) -> String {
        String::new()
    }

    /// Asked before another driver is unbound from its device: whether that is safe for guests. `xl pci-assignable-add` begins with it.
    ///
    /// # Errors
    /// EBUSY when it is not.
    fn may_unbind_other(&self, _device: Bdf) -> Result<(), Errno> {
        Ok(())
    }

    /// Resets a seized device by the best method there is (`do_flr`).
    ///
    /// # Errors
    /// ENODEV when it is not seized, ENOTTY when it cannot be reset, and what the reset failed with.
    fn reset(&self, device: Bdf) -> Result<(), Errno>;
}

/// A field that an operator lays over a device's configuration space, to let a guest write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quirk {
    /// The device.
    pub device: Bdf,
    /// Offset in configuration space, 0 to 0xfff.
    pub offset: u16,
    /// Width in bytes: 1, 2 or 4.
    pub width: u8,
    /// Writable bits; none beyond the width.
    pub mask: u32,
}

impl Quirk {
    /// Reads `[dddd:]bb:ss.f-OFFSET:WIDTH:MASK`, hexadecimal, as the `quirks` file takes it.
    pub fn parse(text: &str) -> Option<Self> {
        let (device, field) = text.trim().split_once('-')?;
        let mut parts = field.split(':').map(hexadecimal);
        let (offset, width, mask) = (parts.next()??, parts.next()??, parts.next()??);
        if parts.next().is_some() || offset > 0xfff {
            return None;
        }
        let bits = match width {
            1 | 2 | 4 => width.checked_mul(8)?,
            _ => return None,
        };
        if mask.checked_shr(bits).is_some_and(|beyond| beyond != 0) {
            return None;
        }
        Some(Self {
            device: device.parse().ok()?,
            offset: u16::try_from(offset).ok()?,
            width: u8::try_from(width).ok()?,
            mask,
        })
    }
}

/// Digits only: `from_str_radix` would take a sign.
fn hexadecimal(text: &str) -> Option<u32> {
    let plain = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if plain {
        u32::from_str_radix(text, 16).ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quirk_is_a_device_and_a_field() {
        let device = "0000:00:05.0".parse().unwrap();
        let quirk = Quirk {
            device,
            offset: 0xc8,
            width: 2,
            mask: 0xff00,
        };
        assert_eq!(Quirk::parse("0000:00:05.0-c8:2:ff00\n"), Some(quirk));
        assert_eq!(Quirk::parse("00:05.0-0c8:2:0000FF00"), Some(quirk));
        assert_eq!(
            Quirk::parse("00:05.0-0:4:ffffffff").map(|quirk| quirk.mask),
            Some(u32::MAX)
        );
    }

    #[test]
    fn a_quirk_that_does_not_fit_is_none() {
        for text in [
            "",
            "00:05.0",
            "00:05.0-1000:1:1",
            "00:05.0-10:3:1",
            "00:05.0-10:0:0",
            "00:05.0-10:1:100",
            "00:05.0-10:2:10000",
            "00:05.0-10:4:100000000",
            "00:05.0-10:1",
            "00:05.0-10:1:1:1",
            "00:05.0-+10:1:1",
            "00:05.0--10:1:1",
            "00:05.*-10:1:1",
        ] {
            assert_eq!(Quirk::parse(text), None, "{text:?}");
        }
    }
}
