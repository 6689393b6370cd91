use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::EfdFlags;

use super::*;
use crate::host::errors::kernel_log::Requester;
use crate::host::vfio::device::tests::slot;

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

fn no_ports(_: Bdf) -> Vec<Bdf> {
    Vec::new()
}

#[test]
fn an_error_that_both_tell_of_is_reported_once() {
    let (port, one, other) = (bdf("00:01.0"), bdf("01:00.0"), bdf("02:00.0"));
    let ports_above = |bdf| if bdf == one { vec![port] } else { vec![] };
    let traced = |source| {
        [ErrorReport {
            source,
            severity: Severity::Fatal,
        }]
    };
    let now = Instant::now();
    let sources = |heard: &[ErrorReport]| -> Vec<Bdf> {
        let mut told = BTreeMap::from([(one, now), (other, now)]);
        let found = unheard(&mut told, heard, ports_above, |_| true);
        assert!(told.is_empty());
        found.into_iter().map(|report| report.source).collect()
    };
    assert_eq!(sources(&[]), [one, other]);
    assert_eq!(sources(&traced(one)), [other]);
    assert_eq!(sources(&traced(port)), [other]);
    assert_eq!(sources(&traced(other)), [one]);
}

fn event() -> EventFd {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap()
}

/// A trace that tells of a report each time, or cannot be read.
#[derive(Debug)]
struct Trace {
    event: EventFd,
    report: Option<ErrorReport>,
    closed: Arc<AtomicBool>,
}

impl Trace {
    fn new(report: Option<ErrorReport>) -> Self {
        Self {
            event: event(),
            report,
            closed: Arc::default(),
        }
    }
}

impl ErrorReports for Trace {
    fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn take(&mut self, _assigned: &[(Bdf, Vec<Bdf>)]) -> io::Result<Vec<ErrorReport>> {
        let report = self.report.ok_or(io::ErrorKind::InvalidData)?;
        Ok(vec![report])
    }

    fn delay(&self) -> Duration {
        Duration::from_secs(3600)
    }

    fn close(self: Box<Self>, _keep: bool) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

/// Hears of the errors of one device, on a host whose sysfs is at `root`.
fn errors(root: &Path, slot: Slot, traced: Trace) -> Errors {
    let shared = Shared {
        slots: RwLock::new(BTreeMap::from([(slot.bdf, Arc::new(slot))])),
        changed: event(),
        errors: Reported::new(event()),
    };
    Errors::new(Arc::new(shared), Sysfs::to_look_at(root), Box::new(traced)).unwrap()
}

/// Has VFIO tell of an error of `told`, and the trace of a fatal one of `source`; all devices are below `port`. It is one error.
fn assert_one_error(port: Bdf, source: Bdf, told: Bdf, assigned: &[(Bdf, Vec<Bdf>)]) {
    let root = tempfile::tempdir().unwrap();
    let below = root.path().join(format!("devices/pci0000:00/{port}"));
    let by_address = root.path().join("bus/pci/devices");
    fs::create_dir_all(&by_address).unwrap();
    for bdf in [source, told] {
        let device = if bdf == port {
            below.clone()
        } else {
            below.join(bdf.to_string())
        };
        fs::create_dir_all(&device).unwrap();
        symlink(&device, by_address.join(bdf.to_string())).unwrap();
    }
    let report = ErrorReport {
        source,
        severity: Severity::Fatal,
    };
    let mut errors = errors(root.path(), slot(told), Trace::new(Some(report)));
    errors.shared.errors.add(told);
    assert_eq!(errors.take(assigned).unwrap(), [report]);
    assert!(errors.told.is_empty(), "would be told of later");
}

#[test]
fn a_fatal_error_of_dom0s_physical_function_is_that_of_a_guests_virtual_function() {
    let (port, physical, guests) = (bdf("00:01.0"), bdf("01:00.0"), bdf("01:10.0"));
    assert_one_error(port, physical, guests, &[(guests, vec![port])]);
}

#[test]
fn a_fatal_error_of_a_port_is_that_of_a_device_below_that_no_guest_has() {
    let port = bdf("00:01.0");
    assert_one_error(port, port, bdf("01:00.0"), &[]);
}

#[test]
fn what_vfio_tells_of_is_reported_when_the_trace_cannot_be_read_any_more() {
    let one = bdf("01:00.0");
    let trace = Trace::new(None);
    let closed = Arc::clone(&trace.closed);
    let mut errors = errors(Path::new("/none"), slot(one), trace);
    let report = ErrorReport {
        source: one,
        severity: Severity::NonFatal,
    };
    for _ in 0..2 {
        errors.shared.errors.add(one);
        assert_eq!(errors.take(&[]).unwrap(), [report]);
        assert!(closed.load(Ordering::Relaxed), "would wake us again");
    }
    Box::new(errors).close(false);
}

#[test]
fn stopped_dma_is_told_apart_from_what_else_a_guest_makes_us_say() {
    let one = bdf("01:00.0");
    let mut errors = errors(Path::new("/none"), slot(one), Trace::new(None));
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    errors.kernel_log = Some(KernelLog::open(kernel.path()).unwrap());
    let record = "3,871,5140900,-;DMAR: [DMA Write NO_PASID] Request device [01:00.0] fault addr 0x40010000 [fault reason 0x05] PTE Write access is not set\n";
    // One for each read, as the kernel gives them.
    for _ in 0..100 {
        kernel.write_all(record.as_bytes()).unwrap();
        assert_eq!(errors.take_stopped(), [one]);
    }
    let slot = errors.shared.slot(one).unwrap();
    assert!(
        !lock(&slot.stopped_dma.0).allow(),
        "as much as there may be"
    );
    assert!(lock(&slot.complaints.0).allow(), "as if nothing had been");
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
        unheard(&mut told, &heard.reports(), no_ports, |_| true),
        [],
        "the same error"
    );
    let much_later = traced.checked_add(UNTIL_TOLD).unwrap();
    heard.add(&[], much_later);
    let mut told = BTreeMap::from([(one, much_later)]);
    let found = unheard(&mut told, &heard.reports(), no_ports, |_| true);
    assert_eq!(found.len(), 1, "another error");
}

#[test]
fn what_a_report_may_still_speak_of_is_waited_for() {
    let one = bdf("01:00.0");
    let mut told = BTreeMap::from([(one, Instant::now())]);
    assert_eq!(unheard(&mut told, &[], no_ports, |_| false), []);
    let report = ErrorReport {
        source: one,
        severity: Severity::Fatal,
    };
    assert_eq!(unheard(&mut told, &[report], no_ports, |_| true), []);
    assert_eq!(unheard(&mut told, &[], no_ports, |_| true), []);
}
