//! Errors that devices report: from the kernel's trace, as on any host, and from VFIO, which tells of those that the trace is silent about.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

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
    /// What VFIO has told of, and when, until it is clear whether a report speaks of it.
    told: Told,
}

type Told = BTreeMap<Bdf, Instant>;

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
            told: BTreeMap::new(),
        })
    }
}

/// Forgets of what VFIO has told what reports speak of, and takes from it what they would speak of by now. How bad that is VFIO does not say.
fn unheard(
    told: &mut Told,
    heard: &[ErrorReport],
    assigned: &[(Bdf, Vec<Bdf>)],
    is_due: impl Fn(Instant) -> bool,
) -> Vec<ErrorReport> {
    let ports_of = |bdf: Bdf| {
        let found = assigned.iter().find(|(device, _)| *device == bdf);
        found.map_or(&[][..], |(_, ports)| ports)
    };
    told.retain(|bdf, _| {
        !heard
            .iter()
            .any(|report| report.concerns(*bdf, ports_of(*bdf), ports_of(report.source)))
    });
    let due = told.extract_if(.., |_, since| is_due(*since));
    due.map(|(source, _)| ErrorReport {
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
        let now = Instant::now();
        // In this order: the kernel traces an error before it tells the drivers of it.
        for bdf in self.shared.errors.take() {
            self.told.entry(bdf).or_insert(now);
        }
        let mut reports = self.traced.take(assigned)?;
        let delay = self.traced.delay();
        let is_due = |since: Instant| now.saturating_duration_since(since) >= delay;
        let unheard = unheard(&mut self.told, &reports, assigned, is_due);
        reports.extend(unheard);
        Ok(reports)
    }

    fn close(self: Box<Self>, keep: bool) {
        self.traced.close(keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bdf(text: &str) -> Bdf {
        text.parse().unwrap()
    }

    #[test]
    fn an_error_that_both_tell_of_is_reported_once() {
        let (port, one, other) = (bdf("00:01.0"), bdf("01:00.0"), bdf("02:00.0"));
        let assigned = [(one, vec![port]), (other, vec![])];
        let traced = |source| {
            [ErrorReport {
                source,
                severity: Severity::Fatal,
            }]
        };
        let now = Instant::now();
        let sources = |heard: &[ErrorReport]| -> Vec<Bdf> {
            let mut told = BTreeMap::from([(one, now), (other, now)]);
            let found = unheard(&mut told, heard, &assigned, |_| true);
            assert!(told.is_empty());
            found.into_iter().map(|report| report.source).collect()
        };
        assert_eq!(sources(&[]), [one, other]);
        assert_eq!(sources(&traced(one)), [other]);
        assert_eq!(sources(&traced(port)), [other]);
        assert_eq!(sources(&traced(other)), [one]);
    }

    #[test]
    fn what_a_report_may_still_speak_of_is_waited_for() {
        let one = bdf("01:00.0");
        let mut told = BTreeMap::from([(one, Instant::now())]);
        assert_eq!(unheard(&mut told, &[], &[], |_| false), []);
        let report = ErrorReport {
            source: one,
            severity: Severity::Fatal,
        };
        assert_eq!(unheard(&mut told, &[report], &[], |_| true), []);
        assert_eq!(unheard(&mut told, &[], &[], |_| true), []);
    }
}
