//! Errors that devices report: from the kernel's trace, as on any host, and from VFIO, which tells of those that the trace is silent about.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use conf_space::Bdf;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;

use super::{Shared, lock};
use crate::host::errors::{ErrorReport, ErrorReports, Severity};

/// Devices whose driver the kernel has told of an error: in our case, VFIO.
#[derive(Debug)]
pub(super) struct Reported {
    event: EventFd,
    devices: Mutex<BTreeSet<Bdf>>,
}

impl Reported {
    pub fn new(event: EventFd) -> Self {
        Self {
            event,
            devices: Mutex::default(),
        }
    }

    pub fn add(&self, bdf: Bdf) {
        lock(&self.devices).insert(bdf);
        let _ = self.event.write(1);
    }

    fn take(&self) -> BTreeSet<Bdf> {
        let _ = self.event.read();
        std::mem::take(&mut lock(&self.devices))
    }
}

/// Both ways.
#[derive(Debug)]
pub(super) struct Errors {
    shared: Arc<Shared>,
    traced: Box<dyn ErrorReports>,
    /// Readable when one of the two is.
    either: Epoll,
}

impl Errors {
    /// # Errors
    /// When descriptors have run out.
    pub fn new(shared: Arc<Shared>, traced: Box<dyn ErrorReports>) -> io::Result<Self> {
        let either = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for fd in [traced.fd(), shared.errors.event.as_fd()] {
            either.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        }
        Ok(Self {
            shared,
            traced,
            either,
        })
    }
}

/// What VFIO has told, and no report speaks of. The kernel traces an error before it tells the drivers of it, so what is in the trace is there
/// already. How bad it is VFIO does not say.
fn unheard(
    told: BTreeSet<Bdf>,
    heard: &[ErrorReport],
    assigned: &[(Bdf, Vec<Bdf>)],
) -> Vec<ErrorReport> {
    let ports_of = |bdf: Bdf| {
        let found = assigned.iter().find(|(device, _)| *device == bdf);
        found.map_or(&[][..], |(_, ports)| ports)
    };
    told.into_iter()
        .filter(|bdf| {
            !heard
                .iter()
                .any(|report| report.concerns(*bdf, ports_of(*bdf), ports_of(report.source)))
        })
        .map(|source| ErrorReport {
            source,
            severity: Severity::NonFatal,
        })
        .collect()
}

impl ErrorReports for Errors {
    fn fd(&self) -> BorrowedFd<'_> {
        self.either.0.as_fd()
    }

    fn take(&mut self, assigned: &[(Bdf, Vec<Bdf>)]) -> io::Result<Vec<ErrorReport>> {
        // In this order: what VFIO tells of is in the trace by then.
        let told = self.shared.errors.take();
        let mut reports = self.traced.take(assigned)?;
        reports.extend(unheard(told, &reports, assigned));
        Ok(reports)
    }

    fn close(self: Box<Self>, keep: bool) {
        self.traced.close(keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_both_tell_of_is_reported_once() {
        let bdf = |text: &str| -> Bdf { text.parse().unwrap() };
        let (port, one, other) = (bdf("00:01.0"), bdf("01:00.0"), bdf("02:00.0"));
        let assigned = [(one, vec![port]), (other, vec![])];
        let traced = |source| {
            [ErrorReport {
                source,
                severity: Severity::Fatal,
            }]
        };
        let told = BTreeSet::from([one, other]);
        let sources = |heard: &[ErrorReport]| -> Vec<Bdf> {
            let found = unheard(told.clone(), heard, &assigned);
            found.into_iter().map(|report| report.source).collect()
        };
        assert_eq!(sources(&[]), [one, other]);
        assert_eq!(sources(&traced(one)), [other]);
        assert_eq!(sources(&traced(port)), [other]);
        assert_eq!(sources(&traced(other)), [one]);
    }
}
