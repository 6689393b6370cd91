//! The kernel's counters of errors in sysfs, looked at once a second where the tracepoint is not to be had.
//!
//! A device's own counters tell of its non-fatal errors. Of its fatal ones many kernels count nothing there, since its link is not to be
//! used any more when they look; the root port counts those of everything below it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use conf_space::address::Bdf;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::{ErrorReport, ErrorReports, Severity};

const PERIOD: Duration = Duration::from_secs(1);

/// A device's counters, as the kernel names the files and the lines in them.
const DEVICE_COUNTERS: [(&str, &str); 2] = [
    (NON_FATAL, "TOTAL_ERR_NONFATAL"),
    (FATAL, "TOTAL_ERR_FATAL"),
];
const NON_FATAL: &str = "aer_dev_nonfatal";
const FATAL: &str = "aer_dev_fatal";
/// A root port's counter of the fatal errors that it was told of.
const PORT_COUNTER: &str = "aer_rootport_total_err_fatal";

/// The counters of the devices that guests have, as they were last seen.
#[derive(Debug)]
pub struct Counters {
    devices: PathBuf,
    timer: TimerFd,
    seen: BTreeMap<(Bdf, &'static str), u64>,
    /// Fatal errors below each root port since it is looked at.
    fatal: BTreeMap<Bdf, FatalErrors>,
}

/// What has been counted of the fatal errors below one root port. Each is one of the port's, and, where the kernel counts it there, of a
/// device's as well. The two are not counted at the same moment, and not read at the same moment.
#[derive(Debug, Clone, Copy, Default)]
struct FatalErrors {
    by_port: u64,
    by_devices: u64,
}

impl FatalErrors {
    /// As many as there must have been.
    fn least(self) -> u64 {
        self.by_port.max(self.by_devices)
    }
}

impl Counters {
    /// Of the devices below a directory like `/sys/bus/pci/devices`.
    ///
    /// # Errors
    /// The kernel's, when it gives us no timer.
    pub fn new(devices: PathBuf) -> io::Result<Self> {
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        timer.set(
            Expiration::Interval(TimeSpec::from_duration(PERIOD)),
            TimerSetTimeFlags::empty(),
        )?;
        Ok(Self {
            devices,
            timer,
            seen: BTreeMap::new(),
            fatal: BTreeMap::new(),
        })
    }

    /// All counters that can tell of an error of these devices.
    fn read(&self, assigned: &[(Bdf, Vec<Bdf>)]) -> BTreeMap<(Bdf, &'static str), u64> {
        let mut found = BTreeMap::new();
        for (bdf, _) in assigned {
            for (file, total) in DEVICE_COUNTERS {
                let count = total_of(&self.devices, *bdf, file, total);
                found.extend(count.map(|count| ((*bdf, file), count)));
            }
        }
        for port in root_ports(assigned) {
            let text = fs::read_to_string(path(&self.devices, port, PORT_COUNTER));
            let count = text.ok().and_then(|text| text.trim().parse().ok());
            found.extend(count.map(|count| ((port, PORT_COUNTER), count)));
        }
        found
    }

    /// Who has reported a fatal error: the devices that count theirs, and the port where there were more than those.
    fn fatal(
        &mut self,
        assigned: &[(Bdf, Vec<Bdf>)],
        rise: impl Fn(Bdf, &'static str) -> u64,
    ) -> Vec<Bdf> {
        let mut sources = Vec::new();
        let ports = root_ports(assigned);
        self.fatal.retain(|port, _| ports.contains(port));
        for port in ports {
            let risen: Vec<(Bdf, u64)> = assigned
                .iter()
                .filter(|(_, ports)| ports.first() == Some(&port))
                .map(|(bdf, _)| (*bdf, rise(*bdf, FATAL)))
                .filter(|(_, rise)| *rise > 0)
                .collect();
            let by_devices = risen
                .iter()
                .fold(0u64, |sum, (_, rise)| sum.saturating_add(*rise));
            let errors = self.fatal.entry(port).or_default();
            let before = errors.least();
            errors.by_devices = errors.by_devices.saturating_add(by_devices);
            errors.by_port = errors.by_port.saturating_add(rise(port, PORT_COUNTER));
            let new = errors.least().saturating_sub(before);
            if new > 0 {
                sources.extend(risen.iter().map(|(bdf, _)| *bdf));
            }
            if new > by_devices {
                sources.push(port);
            }
        }
        // Of the root complex: nobody else counts their errors.
        let alone = assigned.iter().filter(|(_, ports)| ports.is_empty());
        sources.extend(
            alone
                .map(|(bdf, _)| *bdf)
                .filter(|bdf| rise(*bdf, FATAL) > 0),
        );
        sources
    }
}

fn root_ports(assigned: &[(Bdf, Vec<Bdf>)]) -> BTreeSet<Bdf> {
    assigned
        .iter()
        .filter_map(|(_, ports)| ports.first().copied())
        .collect()
}

fn path(devices: &Path, bdf: Bdf, file: &str) -> PathBuf {
    devices.join(bdf.to_string()).join(file)
}

/// The number on the line of a counter file that begins with `total`.
fn total_of(devices: &Path, bdf: Bdf, file: &str, total: &str) -> Option<u64> {
    let text = fs::read_to_string(path(devices, bdf, file)).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix(total)?.trim().parse().ok())
}

/// Correctable errors of a device below such a directory; `None` where the kernel does not count them.
pub fn correctable(devices: &Path, bdf: Bdf) -> Option<u64> {
    total_of(devices, bdf, "aer_dev_correctable", "TOTAL_ERR_COR")
}

impl ErrorReports for Counters {
    fn fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    fn take(&mut self, assigned: &[(Bdf, Vec<Bdf>)]) -> io::Result<Vec<ErrorReport>> {
        // Only so that it is readable again a second later. Whether there was anything to read does not matter.
        let _ = self.timer.wait();
        let now = self.read(assigned);
        let seen = std::mem::replace(&mut self.seen, now.clone());
        let rise = |bdf: Bdf, file: &'static str| -> u64 {
            // One that is new was not looked at before: what it counted until now is no news.
            let both = now.get(&(bdf, file)).zip(seen.get(&(bdf, file)));
            both.map_or(0, |(now, before)| now.saturating_sub(*before))
        };
        let non_fatal = assigned
            .iter()
            .map(|(bdf, _)| *bdf)
            .filter(|bdf| rise(*bdf, NON_FATAL) > 0)
            .map(|source| (source, Severity::NonFatal));
        let fatal = self.fatal(assigned, rise).into_iter();
        let fatal = fatal.map(|source| (source, Severity::Fatal));
        Ok(non_fatal
            .chain(fatal)
            .map(|(source, severity)| ErrorReport { source, severity })
            .collect())
    }

    fn delay(&self) -> Duration {
        // It may just have been looked when the error came, and the kernel may count it later than it tells drivers.
        PERIOD.saturating_mul(2)
    }

    fn close(self: Box<Self>, _keep: bool) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: &str = "0000:01:00.0";
    const PORT: &str = "0000:00:09.0";

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            for device in [DEVICE, PORT] {
                fs::create_dir(tree.0.path().join(device)).unwrap();
            }
            tree.set(
                DEVICE,
                "aer_dev_nonfatal",
                "Undefined 0\nTLP 3\nTOTAL_ERR_NONFATAL 3\n",
            );
            tree.set(DEVICE, "aer_dev_fatal", "DLP 1\nTOTAL_ERR_FATAL 1\n");
            tree.set(DEVICE, "aer_dev_correctable", "RxErr 7\nTOTAL_ERR_COR 9\n");
            tree.set(PORT, PORT_COUNTER, "5\n");
            tree
        }

        fn set(&self, device: &str, file: &str, text: &str) {
            fs::write(self.0.path().join(device).join(file), text).unwrap();
        }

        fn counters(&self) -> Counters {
            Counters::new(self.0.path().to_owned()).unwrap()
        }
    }

    fn assigned() -> Vec<(Bdf, Vec<Bdf>)> {
        vec![(DEVICE.parse().unwrap(), vec![PORT.parse().unwrap()])]
    }

    fn report(source: &str, severity: Severity) -> ErrorReport {
        ErrorReport {
            source: source.parse().unwrap(),
            severity,
        }
    }

    #[test]
    fn what_is_counted_while_a_guest_has_the_device_is_reported_once() {
        let tree = Tree::new();
        let mut counters = tree.counters();
        assert_eq!(counters.take(&assigned()).unwrap(), []);
        tree.set(DEVICE, "aer_dev_nonfatal", "TLP 4\nTOTAL_ERR_NONFATAL 4\n");
        assert_eq!(
            counters.take(&assigned()).unwrap(),
            [report(DEVICE, Severity::NonFatal)]
        );
        assert_eq!(counters.take(&assigned()).unwrap(), []);
        // Given back, and to another guest: what was counted in between is not that one's.
        assert_eq!(counters.take(&[]).unwrap(), []);
        tree.set(DEVICE, "aer_dev_nonfatal", "TLP 5\nTOTAL_ERR_NONFATAL 5\n");
        assert_eq!(counters.take(&assigned()).unwrap(), []);
    }

    #[test]
    fn a_fatal_error_that_the_root_port_alone_counts_is_its_own() {
        let tree = Tree::new();
        let mut counters = tree.counters();
        assert_eq!(counters.take(&assigned()).unwrap(), []);
        tree.set(PORT, PORT_COUNTER, "6\n");
        assert_eq!(
            counters.take(&assigned()).unwrap(),
            [report(PORT, Severity::Fatal)]
        );
    }

    #[test]
    fn a_fatal_error_that_the_device_counts_too_is_reported_once() {
        let tree = Tree::new();
        let mut counters = tree.counters();
        assert_eq!(counters.take(&assigned()).unwrap(), []);
        tree.set(DEVICE, FATAL, "DLP 2\nTOTAL_ERR_FATAL 2\n");
        tree.set(PORT, PORT_COUNTER, "6\n");
        let by_device = report(DEVICE, Severity::Fatal);
        assert_eq!(counters.take(&assigned()).unwrap(), [by_device]);
        // And another's besides its own.
        tree.set(DEVICE, FATAL, "DLP 3\nTOTAL_ERR_FATAL 3\n");
        tree.set(PORT, PORT_COUNTER, "8\n");
        assert_eq!(counters.take(&assigned()).unwrap().len(), 2);
    }

    #[test]
    fn a_fatal_error_that_the_device_counts_a_moment_later_is_reported_once() {
        let tree = Tree::new();
        let mut counters = tree.counters();
        assert_eq!(counters.take(&assigned()).unwrap(), []);
        tree.set(PORT, PORT_COUNTER, "6\n");
        let by_port = report(PORT, Severity::Fatal);
        assert_eq!(counters.take(&assigned()).unwrap(), [by_port]);
        tree.set(DEVICE, FATAL, "DLP 2\nTOTAL_ERR_FATAL 2\n");
        assert_eq!(counters.take(&assigned()).unwrap(), []);
        // The next one is another.
        tree.set(DEVICE, FATAL, "DLP 3\nTOTAL_ERR_FATAL 3\n");
        let by_device = report(DEVICE, Severity::Fatal);
        assert_eq!(counters.take(&assigned()).unwrap(), [by_device]);
        tree.set(PORT, PORT_COUNTER, "7\n");
        assert_eq!(counters.take(&assigned()).unwrap(), []);
    }

    #[test]
    fn the_fatal_errors_of_a_device_of_the_root_complex_are_its_own() {
        let tree = Tree::new();
        let mut counters = tree.counters();
        let alone = [(DEVICE.parse().unwrap(), Vec::new())];
        assert_eq!(counters.take(&alone).unwrap(), []);
        tree.set(DEVICE, FATAL, "DLP 2\nTOTAL_ERR_FATAL 2\n");
        let own = report(DEVICE, Severity::Fatal);
        assert_eq!(counters.take(&alone).unwrap(), [own]);
    }

    #[test]
    fn correctable_errors_are_the_sum_that_the_kernel_makes() {
        let tree = Tree::new();
        let count = |bdf: &str| correctable(tree.0.path(), bdf.parse().unwrap());
        assert_eq!((count(DEVICE), count(PORT)), (Some(9), None));
    }
}
