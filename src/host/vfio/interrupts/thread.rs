//! What a device says to us: that it has reported an error, and that the kernel wants it back. A thread waits for that.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use conf_space::address::Bdf;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use vfio_bindings::bindings::vfio::{VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX};

use super::super::{ioctl, new_event};

/// What somebody else is to hear of: the device has reported an error, or somebody wants it back.
pub(in super::super) trait Listener: Send + Sync + std::fmt::Debug {
    /// The device has reported an uncorrectable error.
    fn error(&self, bdf: Bdf);
    /// The kernel waits for us to let go of the device.
    fn requested(&self, bdf: Bdf);
}

/// What is signalled as long as the device is open.
#[derive(Debug)]
struct Events {
    errors: EventFd,
    requests: EventFd,
    stop: EventFd,
}

/// The thread. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Standing {
    events: Arc<Events>,
    thread: Option<JoinHandle<()>>,
}

impl Standing {
    /// Of an open device.
    ///
    /// # Errors
    /// When descriptors or threads have run out, or the kernel refuses.
    pub fn new(bdf: Bdf, device: &File, listener: &Arc<dyn Listener>) -> io::Result<Self> {
        let events = Arc::new(Events {
            errors: new_event()?,
            requests: new_event()?,
            stop: new_event()?,
        });
        for (event, index) in [
            (&events.errors, VFIO_PCI_ERR_IRQ_INDEX),
            (&events.requests, VFIO_PCI_REQ_IRQ_INDEX),
        ] {
            // Conventional PCI has no errors to report, and kernels before 4.0 make no requests.
            if ioctl::irq_info(device, index).is_ok_and(|(_, count)| count > 0) {
                ioctl::set_triggers(device, index, 0, std::iter::once(Some(event.as_fd())))?;
            }
        }
        let thread = Builder::new().name(format!("vfio {bdf}")).spawn({
            let (events, listener) = (Arc::clone(&events), Arc::clone(listener));
            move || {
                if let Err(error) = events.pass_on(bdf, &*listener) {
                    log::error!("{bdf}: its errors are not heard of any more: {error}");
                }
            }
        })?;
        Ok(Self {
            events,
            thread: Some(thread),
        })
    }
}

impl Events {
    /// The thread: until the device is closed.
    fn pass_on(&self, bdf: Bdf, listener: &dyn Listener) -> io::Result<()> {
        let waiting = |event: &EventFd| event.read().is_ok();
        while !waiting(&self.stop) {
            if waiting(&self.errors) {
                listener.error(bdf);
            }
            if waiting(&self.requests) {
                listener.requested(bdf);
            }
            let mut fds = [&self.errors, &self.requests, &self.stop]
                .map(|event| PollFd::new(event.as_fd(), PollFlags::POLLIN));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        let told = self.events.stop.write(1).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| told) {
            let _ = thread.join();
        }
    }
}
