//! A device's interrupts. The kernel signals the guest's own eventfds, so nobody is between the device and its guest.
//!
//! A device has one of three kinds on, or none. What MSI and MSI-X vectors are to send, Xen programs; when they are on, the enable bits in
//! configuration space say, as on any host, and [`super::config`] brings them here. The INTx line is on while neither is, and a guest has it.
//!
//! All vectors of MSI-X are reserved when it is enabled, since the kernel does not make more later; each is wired by itself as it is programmed.

mod thread;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use conf_space::address::Bdf;
use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use xenbus::sim::{Machine, MsiTarget};
use xenbus::{DomId, Gsi};

use self::thread::Standing;
use super::regions::{ENTRY, MASKED};
use super::{ioctl, lock, new_event};

pub(super) use self::thread::Listener;

/// The kind that is on.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Mode {
    #[default]
    None,
    Line,
    /// With so many vectors.
    Msi(u16),
    MsiX,
}

/// Address and data of a message.
#[derive(Debug, Clone, Copy, Default)]
struct Message {
    address: u64,
    data: u32,
}

/// An MSI-X vector that Xen has programmed.
#[derive(Debug)]
struct Vector {
    message: Message,
    /// The guest's.
    event: Arc<OwnedFd>,
}

#[derive(Debug, Default)]
struct State {
    mode: Mode,
    /// By MSI-X entry.
    vectors: BTreeMap<u16, Vector>,
    /// What the first MSI vector sends, and whose it is.
    msi: Option<(DomId, Message)>,
    /// The guest that may have the line.
    guest: Option<DomId>,
    /// What that guest says by that it has served the line, since it has asked for that.
    end: Option<OwnedFd>,
}

/// A device's interrupts. The kernel takes them down when the device is closed.
#[derive(Debug)]
pub(super) struct Wiring {
    bdf: Bdf,
    device: Arc<File>,
    machine: Machine,
    /// What the INTx line is to the machine; `None`: the device has none.
    line: Option<Gsi>,
    /// How many MSI-X vectors the device has.
    msix_vectors: u32,
    state: Mutex<State>,
    _standing: Standing,
}

fn table_entry(message: Option<Message>) -> [u8; ENTRY] {
    let control = if message.is_some() { 0 } else { MASKED };
    let Message { address, data } = message.unwrap_or_default();
    let mut bytes = [0; ENTRY];
    let parts = address.to_le_bytes().into_iter().chain(data.to_le_bytes());
    for (byte, value) in bytes.iter_mut().zip(parts.chain(control.to_le_bytes())) {
        *byte = value;
    }
    bytes
}

impl Wiring {
    /// Of an open device; nothing is on yet, but for errors and requests.
    ///
    /// # Errors
    /// When descriptors or threads have run out, or the kernel refuses.
    pub fn new(
        bdf: Bdf,
        device: &Arc<File>,
        machine: &Machine,
        line: Option<Gsi>,
        listener: &Arc<dyn Listener>,
    ) -> io::Result<Self> {
        let (_, msix_vectors) = ioctl::irq_info(device, VFIO_PCI_MSIX_IRQ_INDEX)?;
        Ok(Self {
            bdf,
            device: Arc::clone(device),
            machine: machine.clone(),
            line,
            msix_vectors,
            state: Mutex::default(),
            _standing: Standing::new(bdf, device, listener)?,
        })
    }

    /// Programs a message; if its kind is on, it is sent from now on.
    ///
    /// # Errors
    /// The kernel's, and those of running out of descriptors.
    pub fn program(&self, target: MsiTarget) -> io::Result<()> {
        let MsiTarget {
            domain,
            entry,
            address,
            data,
        } = target;
        let message = Message { address, data };
        let mut state = lock(&self.state);
        let Some(entry) = entry else {
            state.msi = Some((domain, message));
            return match state.mode {
                Mode::Msi(count) => self.wire_msi(&state, count),
                _ => Ok(()),
            };
        };
        let event = self.machine.event_of_message(domain, address, data)?;
        if let Some(known) = state.vectors.get_mut(&entry)
            && Arc::ptr_eq(&known.event, &event)
        {
            known.message = message;
            return Ok(());
        }
        if state.mode == Mode::MsiX {
            self.wire(entry, Some(event.as_fd()))?;
        }
        state.vectors.insert(entry, Vector { message, event });
        Ok(())
    }

    /// Forgets a message; nobody is interrupted by it any more.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clear(&self, entry: Option<u16>) -> io::Result<()> {
        let mut state = lock(&self.state);
        let Some(entry) = entry else {
            state.msi = None;
            return match state.mode {
                Mode::Msi(count) => self.wire_msi(&state, count),
                _ => Ok(()),
            };
        };
        if state.vectors.remove(&entry).is_some() && state.mode == Mode::MsiX {
            self.wire(entry, None)?;
        }
        Ok(())
    }

    /// An entry of the MSI-X table, as it is programmed: masked, if it is not.
    pub fn entry(&self, entry: u16) -> [u8; ENTRY] {
        let state = lock(&self.state);
        let message = state.vectors.get(&entry).map(|vector| vector.message);
        table_entry(message)
    }

    /// Wires one MSI-X vector, and leaves the others alone.
    fn wire(&self, entry: u16, event: Option<BorrowedFd<'_>>) -> io::Result<()> {
        ioctl::set_triggers(
            &self.device,
            VFIO_PCI_MSIX_IRQ_INDEX,
            u32::from(entry),
            std::iter::once(event),
        )
    }

    /// Switches MSI-X on or off.
    ///
    /// # Errors
    /// The kernel's; it is off then.
    pub fn set_msix(&self, on: bool) -> io::Result<()> {
        let mut state = lock(&self.state);
        match (on, state.mode) {
            (true, Mode::MsiX) => Ok(()),
            (true, _) => {
                self.switch_off(&mut state);
                let programmed = state.vectors.keys().next_back();
                let needed = programmed.map_or(1, |last| u32::from(*last).saturating_add(1));
                // A machine may not have as many vectors as the device: those that are in use, then.
                let result = self
                    .reserve(&state, self.msix_vectors)
                    .or_else(|_| self.reserve(&state, needed));
                if result.is_ok() {
                    state.mode = Mode::MsiX;
                }
                result
            }
            (false, Mode::MsiX) => {
                self.switch_off(&mut state);
                Ok(())
            }
            (false, _) => Ok(()),
        }
    }

    fn reserve(&self, state: &State, count: u32) -> io::Result<()> {
        let entries = (0..=u16::MAX).take(usize::try_from(count).unwrap_or(0));
        let events = entries.map(|entry| {
            let vector = state.vectors.get(&entry);
            vector.map(|vector| vector.event.as_fd())
        });
        ioctl::set_triggers(&self.device, VFIO_PCI_MSIX_IRQ_INDEX, 0, events)
    }

    /// Switches MSI on with so many vectors, or off (0).
    ///
    /// # Errors
    /// The kernel's; it is off then.
    pub fn set_msi(&self, count: u16) -> io::Result<()> {
        let mut state = lock(&self.state);
        match (count, state.mode) {
            (0, Mode::Msi(_)) => self.switch_off(&mut state),
            (0, _) => {}
            (_, Mode::Msi(before)) if before == count => {}
            _ => {
                self.switch_off(&mut state);
                self.wire_msi(&state, count)?;
                state.mode = Mode::Msi(count);
            }
        }
        Ok(())
    }

    /// Wires all MSI vectors. A device puts the vector's number into the lowest bits of the data.
    fn wire_msi(&self, state: &State, count: u16) -> io::Result<()> {
        let event = |vector: u16| {
            let Some((domain, Message { address, data })) = state.msi else {
                return Ok(None);
            };
            let data = data | u32::from(vector);
            match self.machine.event_of_message(domain, address, data) {
                Ok(event) => Ok(Some(event)),
                // The device may have more on than its guest has mapped.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let events: Vec<_> = (0..count).map(event).collect::<io::Result<_>>()?;
        let wired = events.iter().map(|event| Some(event.as_ref()?.as_fd()));
        ioctl::set_triggers(&self.device, VFIO_PCI_MSI_IRQ_INDEX, 0, wired)
    }

    /// Whose the line is, as far as [`Wiring::set_line`] lets it have it, until [`Wiring::silence`].
    pub fn give_line(&self, guest: DomId) {
        lock(&self.state).guest = Some(guest);
    }

    /// Lets the device interrupt by its line while neither MSI nor MSI-X is on, and a guest has the line, or not.
    ///
    /// # Errors
    /// The kernel's: EBUSY when the line is shared, and the device cannot be told apart from the others on it.
    pub fn set_line(&self, on: bool) -> io::Result<()> {
        let mut state = lock(&self.state);
        match (on, state.mode, self.line, state.guest) {
            (true, Mode::None, Some(line), Some(guest)) => {
                let event = self.machine.event_of_line(guest, line)?;
                let triggers = std::iter::once(Some(event.as_fd()));
                ioctl::set_triggers(&self.device, VFIO_PCI_INTX_IRQ_INDEX, 0, triggers)?;
                state.mode = Mode::Line;
                if let Some(end) = &state.end
                    && let Err(error) = ioctl::unmask_line_by(&self.device, end.as_fd())
                {
                    self.switch_off(&mut state);
                    return Err(error);
                }
            }
            (false, Mode::Line, ..) => self.switch_off(&mut state),
            _ => {}
        }
        Ok(())
    }

    /// The guest has served the line: if the device still raises it, it interrupts again. The kernel knows whether it is masked.
    ///
    /// # Errors
    /// The kernel's: it stays masked.
    pub fn end_of_interrupt(&self) -> io::Result<()> {
        match lock(&self.state).mode {
            Mode::Line => ioctl::unmask_line(&self.device),
            _ => Ok(()),
        }
    }

    /// An eventfd that the guest may write to instead. It is the same until [`Wiring::silence`], whatever is on meanwhile.
    ///
    /// # Errors
    /// EOPNOTSUPP when the kernel offers none.
    pub fn end_event(&self) -> io::Result<OwnedFd> {
        const NEEDED: u32 =
            VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED;
        let mut state = lock(&self.state);
        if let Some(end) = &state.end {
            return end.try_clone();
        }
        let (flags, _) = ioctl::irq_info(&self.device, VFIO_PCI_INTX_IRQ_INDEX)?;
        if flags & NEEDED != NEEDED {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let end: OwnedFd = new_event()?.into();
        let theirs = end.try_clone()?;
        if state.mode == Mode::Line {
            ioctl::unmask_line_by(&self.device, end.as_fd()).map_err(|error| {
                log::debug!(
                    "{}: its line cannot be unmasked by an eventfd: {error}",
                    self.bdf
                );
                Errno::EOPNOTSUPP
            })?;
        }
        state.end = Some(end);
        Ok(theirs)
    }

    /// The guest has the device no more: all messages are forgotten, and nothing is on.
    pub fn silence(&self) {
        let mut state = lock(&self.state);
        self.switch_off(&mut state);
        state.vectors.clear();
        state.msi = None;
        state.guest = None;
        state.end = None;
    }

    fn switch_off(&self, state: &mut State) {
        let index = match state.mode {
            Mode::None => return,
            Mode::Line => VFIO_PCI_INTX_IRQ_INDEX,
            Mode::Msi(_) => VFIO_PCI_MSI_IRQ_INDEX,
            Mode::MsiX => VFIO_PCI_MSIX_IRQ_INDEX,
        };
        if let Err(error) = ioctl::disable_interrupts(&self.device, index) {
            log::error!(
                "{}: its interrupts cannot be switched off: {error}",
                self.bdf
            );
        }
        state.mode = Mode::None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Wiring {
        /// Of a file that is no device: nothing can be switched on.
        pub fn made_up(
            bdf: Bdf,
            device: File,
            machine: &Machine,
            listener: &Arc<dyn Listener>,
        ) -> Self {
            Self {
                bdf,
                _standing: Standing::new(bdf, &device, listener).unwrap(),
                device: Arc::new(device),
                machine: machine.clone(),
                line: None,
                msix_vectors: 0,
                state: Mutex::default(),
            }
        }
    }

    #[test]
    fn an_entry_of_the_table_holds_its_message_or_is_masked() {
        let message = Message {
            address: 0xfee0_1000,
            data: 0x31,
        };
        let expected = [0, 0x10, 0xe0, 0xfe, 0, 0, 0, 0, 0x31, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(table_entry(Some(message)), expected);
        let masked = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
        assert_eq!(table_entry(None), masked);
    }
}
