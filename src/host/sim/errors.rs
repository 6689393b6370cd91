//! Errors that a test, or a demonstration, has devices report, and what dom0's kernel does about them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use conf_space::Bdf;
use conf_space::registers::{error_reporting, express};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::function::Function;
use super::{BRIDGE, SimBus, lock};
use crate::host::HostError;
use crate::host::errors::{ErrorReport, ErrorReports, Severity};

/// Completer abort: an uncorrectable error like any other (PCIe 7.8.4.2, bit 15).
const COMPLETER_ABORT: u32 = 1 << 15;
/// Device status: non-fatal, fatal error detected (PCIe 7.5.3.5).
const NON_FATAL_DETECTED: u32 = 1 << 1;
const FATAL_DETECTED: u32 = 1 << 2;
/// Between the kernel's word of a fatal error and its reset of the link. Whoever hears of it finds the device as it was for so long.
const UNTIL_RESET: Duration = Duration::from_millis(20);

/// Between two ways of resetting the link, where the first one fails. For the kernel it is the time it takes to let go of the devices and to take
/// hold of them again.
const BETWEEN_RESETS: Duration = Duration::from_millis(5);

/// What the kernel has told of errors. As its trace, it keeps what nobody has read yet.
#[derive(Debug, Default)]
pub(super) struct Reported {
    reports: Mutex<Vec<ErrorReport>>,
    listener: Mutex<Option<Arc<EventFd>>>,
}

impl Reported {
    fn push(&self, report: ErrorReport) {
        lock(&self.reports).push(report);
        if let Some(listener) = &*lock(&self.listener)
            && let Err(error) = listener.write(1)
        {
            log::error!("an error's report may be seen late: {error}");
        }
    }
}

#[derive(Debug)]
struct Listener {
    reported: Arc<Reported>,
    event: Arc<EventFd>,
}

impl ErrorReports for Listener {
    fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn take(&mut self, _assigned: &[(Bdf, Vec<Bdf>)]) -> io::Result<Vec<ErrorReport>> {
        // Its count does not matter.
        let _ = self.event.read();
        Ok(std::mem::take(&mut *lock(&self.reported.reports)))
    }

    fn close(self: Box<Self>, keep: bool) {
        if !keep {
            lock(&self.reported.reports).clear();
        }
    }
}

impl Function {
    /// Logs an error as the device does.
    fn log_error(&self, severity: Severity) {
        let Some(base) = self.fixed.error_reporting else {
            return;
        };
        self.set_register(
            base,
            &error_reporting::UNCORRECTABLE_STATUS,
            COMPLETER_ABORT,
        );
        if let Some(base) = self.fixed.express {
            let bit = match severity {
                Severity::NonFatal => NON_FATAL_DETECTED,
                Severity::Fatal => FATAL_DETECTED,
            };
            self.set_register(base, &express::DEVICE_STATUS, bit);
        }
    }

    /// A reset of the link: all is as after power-on, but for the log of errors (PCIe 7.8.4.2: its bits are sticky). A driver of dom0's puts
    /// back what it knows.
    fn reset_link(&self) {
        let logged = self
            .fixed
            .error_reporting
            .map(|base| (base, self.uncorrectable_status(base)));
        if lock(&self.kernel).driver.is_some() {
            self.wipe_and_restore();
        } else {
            self.wipe();
        }
        if let Some((base, logged)) = logged {
            self.set_register(base, &error_reporting::UNCORRECTABLE_STATUS, logged);
        }
    }

    fn uncorrectable_status(&self, base: u16) -> u32 {
        let register = &error_reporting::UNCORRECTABLE_STATUS;
        let offset = base.wrapping_add(register.offset);
        conf_space::ConfigSpace::read(&self.space, offset, register.width).unwrap_or(0)
    }
}

impl SimBus {
    pub(super) fn watch_errors(&self) -> Result<Box<dyn ErrorReports>, HostError> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).map_err(
            |errno| HostError::NoErrors {
                source: errno.into(),
            },
        )?;
        let event = Arc::new(event);
        *lock(&self.errors.listener) = Some(Arc::clone(&event));
        // What was reported before is there to be read.
        if !lock(&self.errors.reports).is_empty() {
            let _ = event.write(1);
        }
        Ok(Box::new(Listener {
            reported: Arc::clone(&self.errors),
            event,
        }))
    }

    /// The device reports an uncorrectable error. As Linux, the kernel tells of it first, and a moment later, for a fatal one, resets the link: for
    /// as long as [`SimBus::set_reset_time`] says for this device nobody gets at the devices on its bus, which are as after power-on
    /// afterwards.
    pub fn report_error(&self, bdf: Bdf, severity: Severity) {
        self.with(bdf, |function| function.log_error(severity));
        self.errors.push(ErrorReport {
            source: bdf,
            severity,
        });
        if severity == Severity::Fatal {
            thread::sleep(UNTIL_RESET);
            self.reset_link(bdf);
            if self.with(bdf, |function| lock(&function.faults).link_reset_fails) == Some(true) {
                thread::sleep(BETWEEN_RESETS);
                self.reset_link(bdf);
            }
        }
    }

    fn reset_link(&self, bdf: Bdf) {
        let on_the_link: Vec<Arc<Function>> = self
            .all()
            .into_iter()
            .filter(|function| {
                let other = function.bdf();
                other == bdf || (bdf.bus() != BRIDGE.bus() && other.bus() == bdf.bus())
            })
            .collect();
        let time = self.with(bdf, |function| lock(&function.faults).reset_time);
        for function in &on_the_link {
            *lock(&function.resetting) = true;
        }
        thread::sleep(time.unwrap_or_default());
        for function in &on_the_link {
            function.reset_link();
            *lock(&function.resetting) = false;
            function.reset_done.notify_all();
        }
    }

    /// The device reports a correctable error, which the kernel counts.
    pub fn report_correctable_error(&self, bdf: Bdf) {
        self.with(bdf, |function| {
            let mut faults = lock(&function.faults);
            faults.correctable_errors = faults.correctable_errors.saturating_add(1);
        });
    }
}

/// The root port that a bus is behind: from [`BRIDGE`] on, a function for each.
pub(super) fn port_above(bus: u8) -> Bdf {
    let function = bus.wrapping_sub(1) & 7;
    Bdf::from_devfn(0, BRIDGE.bus(), BRIDGE.devfn() | function)
}
