//! Errors that devices report: from the kernel's trace, as on any host, and from VFIO, which tells of those that the trace is silent about; and
//! their DMA that the IOMMU has stopped, from the kernel's log.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use conf_space::Bdf;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;
use xenbus::DomId;

use super::device::Slot;
use super::{Shared, lock};
use crate::host::Bus;
use crate::host::errors::kernel_log::{Access, KERNEL_LOG, KernelLog, StoppedDma};
use crate::host::errors::{ErrorReport, ErrorReports, Severity};
use crate::host::sysfs::Sysfs;

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

/// The kernel traces an error before it tells the drivers of it, which takes as long as the others take that it tells.
const UNTIL_TOLD: Duration = Duration::from_secs(2);

/// Reports that VFIO may still tell of, the last of each kind.
#[derive(Debug, Default)]
struct Heard(Vec<(ErrorReport, Instant)>);

impl Heard {
    fn add(&mut self, reports: &[ErrorReport], now: Instant) {
        self.0.retain(|(report, since)| {
            now.saturating_duration_since(*since) < UNTIL_TOLD && !reports.contains(report)
        });
        self.0.extend(reports.iter().map(|report| (*report, now)));
    }

    fn reports(&self) -> Vec<ErrorReport> {
        self.0.iter().map(|(report, _)| *report).collect()
    }
}

/// All three ways.
#[derive(Debug)]
pub(super) struct Errors {
    shared: Arc<Shared>,
    sysfs: Sysfs,
    traced: Box<dyn ErrorReports>,
    /// `None`: it cannot be read.
    kernel_log: Option<KernelLog>,
    /// Readable when one of them is.
    any: Epoll,
    /// What VFIO has told of, and when, until it is clear whether a report speaks of it.
    told: Told,
    heard: Heard,
}

type Told = BTreeMap<Bdf, Instant>;

impl Errors {
    /// # Errors
    /// When descriptors have run out.
    pub fn new(
        shared: Arc<Shared>,
        sysfs: Sysfs,
        traced: Box<dyn ErrorReports>,
    ) -> io::Result<Self> {
        let any = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let listen = |fd: BorrowedFd<'_>| any.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0));
        listen(traced.fd())?;
        listen(shared.errors.event.as_fd())?;
        let kernel_log = KernelLog::open(Path::new(KERNEL_LOG))
            .and_then(|log| {
                listen(log.fd())?;
                Ok(log)
            })
            .inspect_err(|error| {
                log::warn!(
                    "DMA of guests' devices that the IOMMU stops is told by the kernel only (dmesg), for {KERNEL_LOG} cannot be read: {error}; pcibackd \
                     needs CAP_SYSLOG for that, and under systemd DeviceAllow=/dev/kmsg and no ProtectKernelLogs="
                );
            });
        Ok(Self {
            shared,
            sysfs,
            traced,
            kernel_log: kernel_log.ok(),
            any,
            told: BTreeMap::new(),
            heard: Heard::default(),
        })
    }

    /// Those whose DMA it may have been: the device itself, or all behind the bridge that has asked for it; of these, those that guests have, if any:
    /// others are no masters of the bus.
    fn requesters(&self, stopped: &StoppedDma) -> Vec<Arc<Slot>> {
        let slots = self.shared.slots();
        let is_itself = |slot: &&Arc<Slot>| stopped.requester.is(slot.bdf);
        if slots.iter().any(|slot| is_itself(&slot)) {
            return slots.iter().filter(is_itself).cloned().collect();
        }
        let exists = |bdf| self.sysfs.device(bdf).exists();
        let is_behind = |slot: &Arc<Slot>| {
            let ports = self.sysfs.ports_above(slot.bdf).unwrap_or_default();
            stopped.requester.stands_for(slot.bdf, &ports, exists)
        };
        let mut behind: Vec<_> = slots.into_iter().filter(is_behind).collect();
        if behind.iter().any(|slot| slot.owner().is_some()) {
            behind.retain(|slot| slot.owner().is_some());
        }
        behind
    }
}

/// What a guest's device has done, in an operator's words. `alone`: it was this one, and no other behind the same bridge.
fn describe(bdf: Bdf, owner: Option<DomId>, alone: bool, stopped: &StoppedDma) -> String {
    let beside = if alone {
        ""
    } else {
        " (or another device behind the same bridge)"
    };
    let wanted = match stopped.access {
        Access::Read => "read from",
        Access::Write => "write to",
    };
    let address = stopped.address;
    match owner {
        Some(domain) => format!(
            "{bdf}{beside}, which domain {domain} has, was to {wanted} {address:#x}, where its guest has given it no memory; the IOMMU has stopped it. \
             The guest's driver is at fault, or means harm: if it goes on, detach the device"
        ),
        None => format!(
            "{bdf}{beside}, which no guest has, was to {wanted} {address:#x}; the IOMMU has stopped it. It goes on with what a former guest's driver \
             wanted: pciback reset {bdf}"
        ),
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
        self.any.0.as_fd()
    }

    fn take(&mut self, assigned: &[(Bdf, Vec<Bdf>)]) -> io::Result<Vec<ErrorReport>> {
        let now = Instant::now();
        // In this order: what VFIO has told of by now was traced before.
        for bdf in self.shared.errors.take() {
            self.told.entry(bdf).or_insert(now);
        }
        let mut reports = self.traced.take(assigned)?;
        let delay = self.traced.delay();
        let is_due = |since: Instant| now.saturating_duration_since(since) >= delay;
        self.heard.add(&reports, now);
        let heard = self.heard.reports();
        reports.extend(unheard(&mut self.told, &heard, assigned, is_due));
        Ok(reports)
    }

    fn take_stopped(&mut self) -> Vec<Bdf> {
        let Some(log) = &mut self.kernel_log else {
            return Vec::new();
        };
        let stopped = match log.take() {
            Ok(stopped) => stopped,
            Err(error) => {
                log::error!(
                    "DMA that the IOMMU stops is told by the kernel only (dmesg) from now on: {KERNEL_LOG} cannot be read: {error}; restart pcibackd to \
                     try again"
                );
                // Closed, it is waited for no more.
                self.kernel_log = None;
                return Vec::new();
            }
        };
        let mut found = Vec::new();
        for stopped in stopped {
            for slot in self.requesters(&stopped) {
                let alone = stopped.requester.is(slot.bdf);
                slot.complaints
                    .warn(|| describe(slot.bdf, slot.owner(), alone, &stopped));
                found.push(slot.bdf);
            }
        }
        found
    }

    fn close(self: Box<Self>, keep: bool) {
        self.traced.close(keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::errors::kernel_log::Requester;

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
    fn stopped_dma_is_told_with_whose_it_was_and_where_it_went() {
        let stopped = |access| StoppedDma {
            requester: Requester::parse("01:00.0").unwrap(),
            access,
            address: 0x4001_0000,
        };
        let one = bdf("01:00.0");
        let of_guest = describe(one, Some(DomId(3)), true, &stopped(Access::Write));
        assert!(
            of_guest.starts_with("0000:01:00.0, which domain 3 has, was to write to 0x40010000,"),
            "{of_guest}"
        );
        assert!(of_guest.contains("detach the device"), "{of_guest}");
        let of_nobody = describe(one, None, false, &stopped(Access::Read));
        assert!(
            of_nobody.contains("behind the same bridge), which no guest has, was to read from"),
            "{of_nobody}"
        );
        assert!(
            of_nobody.ends_with("pciback reset 0000:01:00.0"),
            "{of_nobody}"
        );
    }

    #[test]
    fn what_vfio_tells_of_after_its_report_is_not_reported_again() {
        let one = bdf("01:00.0");
        let report = ErrorReport {
            source: one,
            severity: Severity::Fatal,
        };
        let mut heard = Heard::default();
        let traced = Instant::now();
        heard.add(&[report], traced);
        heard.add(&[report], traced);
        assert_eq!(heard.reports(), [report]);
        let later = traced.checked_add(Duration::from_millis(500)).unwrap();
        heard.add(&[], later);
        let mut told = BTreeMap::from([(one, later)]);
        assert_eq!(
            unheard(&mut told, &heard.reports(), &[], |_| true),
            [],
            "the same error"
        );
        let much_later = traced.checked_add(UNTIL_TOLD).unwrap();
        heard.add(&[], much_later);
        let mut told = BTreeMap::from([(one, much_later)]);
        let found = unheard(&mut told, &heard.reports(), &[], |_| true);
        assert_eq!(found.len(), 1, "another error");
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
