//! Recoveries on a host whose kernel has no tracepoint for errors: its counters in sysfs are looked at once a second.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use conf_space::Bdf;
use pcibackd::host::Bus;
use pcibackd::host::errors::Severity::{self, Fatal, NonFatal};
use pcibackd::host::sim::NVME;
use pcibackd::host::sysfs::Sysfs;
use tempfile::TempDir;
use xenbus::pciif::AerCommand::{Detected, Resume};
use xenbus::pciif::{AerResult, ChannelState};
use xenbus::sim::Frontend;

use super::{Setup, expect, reset_and_resume, working};

/// Two looks and a bit.
const TWO_LOOKS: Duration = Duration::from_millis(2200);

/// A sysfs without `kernel/tracing`, with the counters of the NVMe drive and of the root port above it.
struct Counters {
    sysfs: TempDir,
    port: Bdf,
}

impl Counters {
    fn new(port: Bdf) -> Self {
        let counters = Self {
            sysfs: tempfile::tempdir().unwrap(),
            port,
        };
        for bdf in [NVME, port] {
            fs::create_dir_all(counters.device(bdf)).unwrap();
        }
        counters.device_counts(NonFatal, 7);
        counters.device_counts(Fatal, 3);
        counters.port_counts(11);
        counters
    }

    fn device(&self, bdf: Bdf) -> std::path::PathBuf {
        let devices = self.sysfs.path().join("bus/pci/devices");
        devices.join(bdf.to_string())
    }

    fn write(&self, path: &Path, text: &str) {
        // Not to be read half written.
        let new = self.sysfs.path().join("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }

    /// As Linux words it (`aer_dev_nonfatal`, `aer_dev_fatal`).
    fn device_counts(&self, severity: Severity, count: u32) {
        let (file, total) = match severity {
            NonFatal => ("aer_dev_nonfatal", "TOTAL_ERR_NONFATAL"),
            Fatal => ("aer_dev_fatal", "TOTAL_ERR_FATAL"),
        };
        let text = format!("Undefined 0\nDLP {count}\nSDES 0\n{total} {count}\n");
        self.write(&self.device(NVME).join(file), &text);
    }

    fn port_counts(&self, count: u32) {
        let file = self.device(self.port).join("aer_rootport_total_err_fatal");
        self.write(&file, &format!("{count}\n"));
    }
}

/// A guest whose NVMe drive is at work, with a daemon that has looked at the counters once.
fn counting() -> (Setup, Frontend, Counters) {
    let (mut setup, _, mut frontend) = working("");
    let port = setup.house.bus.ports_above(NVME).unwrap()[0];
    let counters = Counters::new(port);
    let sysfs = Sysfs::to_look_at(counters.sysfs.path());
    setup.house.restart_hearing_of_errors_by(Arc::new(sysfs));
    // What was counted before is no news.
    assert_eq!(frontend.next_aer(TWO_LOOKS).unwrap(), None);
    (setup, frontend, counters)
}

#[test]
fn a_non_fatal_error_that_the_device_counts_is_recovered_from() {
    let (setup, mut frontend, counters) = counting();
    counters.device_counts(NonFatal, 8);
    expect(&mut frontend, Detected, ChannelState::Normal);
    frontend.answer_aer(AerResult::CanRecover).unwrap();
    expect(&mut frontend, Resume, ChannelState::Normal);
    frontend.answer_aer(AerResult::None).unwrap();
    setup.until_recovered(NVME);
    assert_eq!(frontend.next_aer(TWO_LOOKS).unwrap(), None);
    assert_eq!(setup.house.record(NVME).errors().counted(NonFatal), 1);
}

#[test]
fn a_fatal_error_that_the_port_counts_first_and_the_device_later_is_recovered_from_once() {
    let (setup, mut frontend, counters) = counting();
    counters.port_counts(12);
    // The kernel resets the link.
    setup.report(Fatal);
    expect(&mut frontend, Detected, ChannelState::Frozen);
    counters.device_counts(Fatal, 4);
    reset_and_resume(&setup, &mut frontend);
    assert_eq!(frontend.next_aer(TWO_LOOKS).unwrap(), None);
    assert_eq!(setup.house.record(NVME).errors().counted(Fatal), 1);
}
