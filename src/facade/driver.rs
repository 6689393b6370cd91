//! What the facade asks of the daemon.

use conf_space::address::Bdf;
use conf_space::overlay::quirk::DeviceQuirk;
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
    /// ENODEV when it is not seized, ENOMEM when it has too many.
    fn add_quirk(&self, quirk: DeviceQuirk) -> Result<(), Errno>;

    /// The text of `irq_handlers`: the backend's own handlers for shared INTx lines.
    fn irq_handlers(&self) -> String;

    /// Turns the state of a device's handler around (`irq_handler_state`).
    ///
    /// # Errors
    /// ENOENT when it is not seized.
    fn turn_irq_handler(&self, device: Bdf) -> Result<(), Errno>;

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
