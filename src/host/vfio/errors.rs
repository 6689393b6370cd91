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
    /// `None`: it cannot be read any more.
    traced: Option<Box<dyn ErrorReports>>,
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
            traced: Some(traced),
            kernel_log: kernel_log.ok(),
            any,
            told: BTreeMap::new(),
            heard: Heard::default(),
        })
    }

    /// What the trace has told of since the last time.
    fn take_traced(&mut self, assigned: &[(Bdf, Vec<Bdf>)]) -> Vec<ErrorReport> {
        let Some(traced) = &mut self.traced else {
            return Vec::new();
        };
        let error = match traced.take(assigned) {
            Ok(reports) => return reports,
            Err(error) => error,
        };
        log::error!(
            "errors of devices are heard of through VFIO only from now on, and taken for non-fatal, for VFIO does not say how bad they are: what the \
             kernel traces or counts of them cannot be read: {error}; restart pcibackd to try again"
        );
        // Closed, it is waited for no more.
        if let Some(traced) = self.traced.take() {
            traced.close(!assigned.is_empty());
        }
        Vec::new()
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
/// Neither who reports an error nor whom VFIO tells of it need be a guest's: it may be a port, a physical function of dom0's, a device that waits
/// for its guest.
fn unheard(
    told: &mut Told,
    heard: &[ErrorReport],
    ports_above: impl Fn(Bdf) -> Vec<Bdf>,
    is_due: impl Fn(Instant) -> bool,
) -> Vec<ErrorReport> {
    told.retain(|bdf, _| {
        let ports = ports_above(*bdf);
        !heard
            .iter()
            .any(|report| report.concerns(*bdf, &ports, &ports_above(report.source)))
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
        let mut reports = self.take_traced(assigned);
        let delay = self.traced.as_ref().map_or(Duration::ZERO, |it| it.delay());
        let is_due = |since: Instant| now.saturating_duration_since(since) >= delay;
        self.heard.add(&reports, now);
        let heard = self.heard.reports();
        let ports_above = |bdf| self.sysfs.ports_above(bdf).unwrap_or_default();
        reports.extend(unheard(&mut self.told, &heard, ports_above, is_due));
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
                slot.stopped_dma
                    .warn(|| describe(slot.bdf, slot.owner(), alone, &stopped));
                found.push(slot.bdf);
            }
        }
        found
    }

    fn close(self: Box<Self>, keep: bool) {
        if let Some(traced) = self.traced {
            traced.close(keep);
        }
    }
}

#[cfg(test)]
mod tests;
