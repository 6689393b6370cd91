//! A device's interrupts: eventfds that the kernel signals, and a thread that passes them on.
//!
//! A device has one of three kinds on, or none. What MSI and MSI-X vectors are to send, Xen programs; when they are on, the enable bits in
//! configuration space say, as on any host, and [`super::config`] brings them here. The INTx line is on while neither is, and a guest has
//! the device.
//!
//! All vectors of MSI-X are reserved when it is enabled, since the kernel does not make more later; each is wired by itself as it is programmed.

mod thread;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use conf_space::address::Bdf;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};
use xenbus::Gsi;
use xenbus::sim::{Machine, MsiTarget};

use self::thread::{Inner, Source};
use super::regions::{ENTRY, MASKED};
use super::{ioctl, lock};

/// What somebody else is to hear of: the device has reported an error, or somebody wants it back.
pub(super) trait Listener: Send + Sync + std::fmt::Debug {
    /// The device has reported an uncorrectable error.
    fn error(&self, bdf: Bdf);
    /// The kernel waits for us to let go of the device.
    fn requested(&self, bdf: Bdf);
}

/// The kind that is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    None,
    Line,
    Msi,
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
    event: EventFd,
    message: Message,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    /// By MSI-X entry.
    vectors: BTreeMap<u16, Vector>,
    /// What the first MSI vector sends.
    msi: Option<Message>,
    /// Of MSI vectors, and of the line, while they are on.
    events: Vec<EventFd>,
}

/// A device's interrupts. Dropping it ends the thread; the kernel takes the interrupts down when the device is closed.
#[derive(Debug)]
pub(super) struct Wiring {
    inner: Arc<Inner>,
    /// How many MSI-X vectors the device has.
    msix_vectors: u32,
    thread: Option<JoinHandle<()>>,
}

fn new_event() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(
        EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
    )?)
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
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let standing = [new_event()?, new_event()?, new_event()?];
        let sources = [Source::Error, Source::Request, Source::Stop];
        for (event, source) in standing.iter().zip(sources) {
            epoll.add(event, EpollEvent::new(EpollFlags::EPOLLIN, source.token()))?;
        }
        let [errors, requests, _] = &standing;
        for (event, index) in [
            (errors, VFIO_PCI_ERR_IRQ_INDEX),
            (requests, VFIO_PCI_REQ_IRQ_INDEX),
        ] {
            // Conventional PCI has no errors to report, and kernels before 4.0 make no requests.
            if ioctl::irq_info(device, index).is_ok_and(|(_, count)| count > 0) {
                ioctl::set_triggers(device, index, 0, std::iter::once(Some(event.as_fd())))?;
            }
        }
        let (_, msix_vectors) = ioctl::irq_info(device, VFIO_PCI_MSIX_IRQ_INDEX)?;
        let inner = Arc::new(Inner {
            bdf,
            device: Arc::clone(device),
            machine: machine.clone(),
            line,
            listener: Arc::clone(listener),
            epoll,
            raised: AtomicBool::new(false),
            state: Mutex::new(State {
                mode: Mode::None,
                vectors: BTreeMap::new(),
                msi: None,
                events: Vec::new(),
            }),
            standing,
        });
        let thread = Builder::new().name(format!("vfio {bdf}")).spawn({
            let inner = Arc::clone(&inner);
            move || inner.pass_on()
        })?;
        Ok(Self {
            inner,
            msix_vectors,
            thread: Some(thread),
        })
    }

    /// Programs a message; if MSI-X is on, it is sent from now on.
    ///
    /// # Errors
    /// The kernel's, and those of running out of descriptors.
    pub fn program(&self, target: MsiTarget) -> io::Result<()> {
        let message = Message {
            address: target.address,
            data: target.data,
        };
        let mut state = lock(&self.inner.state);
        let Some(entry) = target.entry else {
            state.msi = Some(message);
            return Ok(());
        };
        if let Some(known) = state.vectors.get_mut(&entry) {
            known.message = message;
            return Ok(());
        }
        let event = new_event()?;
        self.inner.listen(&event, Source::MsiX(entry))?;
        if state.mode == Mode::MsiX {
            self.wire(entry, Some(event.as_fd()))?;
        }
        state.vectors.insert(entry, Vector { event, message });
        Ok(())
    }

    /// Forgets a message; nobody is interrupted by it any more.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clear(&self, entry: Option<u16>) -> io::Result<()> {
        let mut state = lock(&self.inner.state);
        let Some(entry) = entry else {
            state.msi = None;
            return Ok(());
        };
        if state.vectors.remove(&entry).is_some() && state.mode == Mode::MsiX {
            self.wire(entry, None)?;
        }
        Ok(())
    }

    /// An entry of the MSI-X table, as it is programmed: masked, if it is not.
    pub fn entry(&self, entry: u16) -> [u8; ENTRY] {
        let state = lock(&self.inner.state);
        let message = state.vectors.get(&entry).map(|vector| vector.message);
        table_entry(message)
    }

    /// Wires one MSI-X vector, and leaves the others alone.
    fn wire(&self, entry: u16, event: Option<BorrowedFd<'_>>) -> io::Result<()> {
        ioctl::set_triggers(
            &self.inner.device,
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
        let mut state = lock(&self.inner.state);
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
        ioctl::set_triggers(&self.inner.device, VFIO_PCI_MSIX_IRQ_INDEX, 0, events)
    }

    /// Switches MSI on with so many vectors, or off (0).
    ///
    /// # Errors
    /// The kernel's; it is off then.
    pub fn set_msi(&self, count: u16) -> io::Result<()> {
        let mut state = lock(&self.inner.state);
        if count == 0 {
            if state.mode == Mode::Msi {
                self.switch_off(&mut state);
            }
            return Ok(());
        }
        if state.mode == Mode::Msi && state.events.len() == usize::from(count) {
            return Ok(());
        }
        self.switch_off(&mut state);
        let events: Vec<EventFd> = (0..count).map(|_| new_event()).collect::<Result<_, _>>()?;
        for (event, vector) in events.iter().zip(0..) {
            self.inner.listen(event, Source::Msi(vector))?;
        }
        ioctl::set_triggers(
            &self.inner.device,
            VFIO_PCI_MSI_IRQ_INDEX,
            0,
            events.iter().map(|event| Some(event.as_fd())),
        )?;
        state.events = events;
        state.mode = Mode::Msi;
        Ok(())
    }

    /// Lets the device interrupt by its line while neither MSI nor MSI-X is on, or not.
    ///
    /// # Errors
    /// The kernel's: EBUSY when the line is shared, and the device cannot be told apart from the others on it.
    pub fn set_line(&self, on: bool) -> io::Result<()> {
        let mut state = lock(&self.inner.state);
        match (on && self.inner.line.is_some(), state.mode) {
            (true, Mode::None) => {
                let event = new_event()?;
                self.inner.listen(&event, Source::Line)?;
                self.inner.raised.store(false, Ordering::Release);
                ioctl::set_triggers(
                    &self.inner.device,
                    VFIO_PCI_INTX_IRQ_INDEX,
                    0,
                    std::iter::once(Some(event.as_fd())),
                )?;
                state.events = vec![event];
                state.mode = Mode::Line;
            }
            (false, Mode::Line) => self.switch_off(&mut state),
            _ => {}
        }
        Ok(())
    }

    /// Whether the device interrupts by its line.
    fn is_line_on(&self) -> bool {
        lock(&self.inner.state).mode == Mode::Line
    }

    /// The guest has served the line: if the device still raises it, it interrupts again.
    pub fn end_of_interrupt(&self) {
        if self.inner.raised.swap(false, Ordering::AcqRel)
            && self.is_line_on()
            && let Err(error) = ioctl::unmask_line(&self.inner.device)
        {
            log::error!(
                "{}: its interrupt line stays masked: {error}",
                self.inner.bdf
            );
        }
    }

    /// All messages are forgotten, and nothing is on.
    pub fn silence(&self) {
        let mut state = lock(&self.inner.state);
        self.switch_off(&mut state);
        state.vectors.clear();
        state.msi = None;
    }

    fn switch_off(&self, state: &mut State) {
        let index = match state.mode {
            Mode::None => return,
            Mode::Line => VFIO_PCI_INTX_IRQ_INDEX,
            Mode::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Mode::MsiX => VFIO_PCI_MSIX_IRQ_INDEX,
        };
        if let Err(error) = ioctl::disable_interrupts(&self.inner.device, index) {
            log::error!(
                "{}: its interrupts cannot be switched off: {error}",
                self.inner.bdf
            );
        }
        state.mode = Mode::None;
        state.events.clear();
    }
}

impl Drop for Wiring {
    fn drop(&mut self) {
        let [_, _, stop] = &self.inner.standing;
        let told = stop.write(1).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| told) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
