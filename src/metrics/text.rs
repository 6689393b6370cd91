//! The metrics, in Prometheus' text format (version 0.0.4). Pure.

use std::fmt::{Display, Write};
use std::time::{Duration, SystemTime};

use conf_space::address::Bdf;
use xenbus::{DomId, XenbusState};

use crate::host::errors::Severity;
use crate::host::record::Phase;
use crate::session::Status;

/// What is told.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The daemon's version.
    pub version: &'static str,
    /// `xen` or `sim`.
    pub platform: &'static str,
    /// When the daemon started.
    pub started: SystemTime,
    /// The guests.
    pub guests: Vec<(DomId, Status)>,
    /// The hidden devices.
    pub devices: Vec<HiddenDevice>,
}

/// What is told of a hidden device.
#[derive(Debug, Clone)]
pub struct HiddenDevice {
    /// Its address.
    pub bdf: Bdf,
    /// Where it is.
    pub phase: Option<Phase>,
    /// How often it was reset since it was hidden.
    pub resets: u32,
    /// How many uncorrectable errors it has reported since, by severity.
    pub errors: [(Severity, u32); Severity::COUNT],
    /// How often an IOMMU has stopped its DMA since.
    pub stopped_dma: u32,
}

/// What a metric is.
#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Text that is being written. Writing into a string cannot fail, so that results are dropped.
struct Page(String);

impl Page {
    fn begin(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &dyn Display)], value: impl Display) {
        self.0.push_str(name);
        for (n, (label, content)) in labels.iter().enumerate() {
            let before = if n == 0 { '{' } else { ',' };
            let content = escaped(&content.to_string());
            let _ = write!(self.0, "{before}{label}=\"{content}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }
}

/// A label's value between its quotes.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => safe.push_str("\\\\"),
            '"' => safe.push_str("\\\""),
            '\n' => safe.push_str("\\n"),
            other => safe.push(other),
        }
    }
    safe
}

/// All metrics.
pub fn render(snapshot: &Snapshot) -> String {
    let mut page = Page(String::new());
    daemon(&mut page, snapshot);
    devices(&mut page, snapshot);
    guests(&mut page, snapshot);
    operations(&mut page, snapshot);
    latency(&mut page, snapshot);
    page.0
}

fn daemon(page: &mut Page, snapshot: &Snapshot) {
    let name = "pciback_build_info";
    page.begin(name, Kind::Gauge, "The daemon's version and platform.");
    let labels: [(&str, &dyn Display); 2] = [
        ("version", &snapshot.version),
        ("platform", &snapshot.platform),
    ];
    page.sample(name, &labels, 1);
    let name = "process_start_time_seconds";
    page.begin(name, Kind::Gauge, "When the daemon started, since 1970.");
    let started = snapshot.started.duration_since(SystemTime::UNIX_EPOCH);
    page.sample(name, &[], started.unwrap_or_default().as_secs_f64());
}

fn devices(page: &mut Page, snapshot: &Snapshot) {
    let name = "pciback_devices";
    page.begin(
        name,
        Kind::Gauge,
        "Devices that are hidden from dom0, by state.",
    );
    for phase in Phase::ALL {
        let devices = snapshot.devices.iter();
        let there = devices.filter(|device| device.phase == Some(phase)).count();
        page.sample(name, &[("state", &phase.name())], there);
    }
    let name = "pciback_device_resets_total";
    page.begin(
        name,
        Kind::Counter,
        "Resets of a device since it was hidden.",
    );
    for device in &snapshot.devices {
        page.sample(name, &[("device", &device.bdf)], device.resets);
    }
    let name = "pciback_device_errors_total";
    page.begin(
        name,
        Kind::Counter,
        "Uncorrectable errors (AER) of a device since it was hidden.",
    );
    for device in &snapshot.devices {
        for (severity, count) in &device.errors {
            let labels: [(&str, &dyn Display); 2] =
                [("device", &device.bdf), ("severity", &severity.name())];
            page.sample(name, &labels, count);
        }
    }
    let name = "pciback_device_stopped_dma_total";
    page.begin(
        name,
        Kind::Counter,
        "How often the IOMMU has stopped DMA of a device since it was hidden, as far as the kernel has told.",
    );
    for device in &snapshot.devices {
        page.sample(name, &[("device", &device.bdf)], device.stopped_dma);
    }
}

/// A sample for each guest.
fn each_guest<T: Display>(
    page: &mut Page,
    snapshot: &Snapshot,
    (name, kind, help): (&str, Kind, &str),
    value: impl Fn(&Status) -> T,
) {
    page.begin(name, kind, help);
    for (domain, status) in &snapshot.guests {
        let labels: [(&str, &dyn Display); 2] = [("domain", domain), ("name", &status.name)];
        page.sample(name, &labels, value(status));
    }
}

fn guests(page: &mut Page, snapshot: &Snapshot) {
    each_guest(
        page,
        snapshot,
        (
            "pciback_guest_connected",
            Kind::Gauge,
            "Whether backend and frontend are both connected.",
        ),
        |status| {
            let connected = Some((XenbusState::Connected, XenbusState::Connected));
            u8::from(status.states == connected)
        },
    );
    each_guest(
        page,
        snapshot,
        (
            "pciback_guest_devices",
            Kind::Gauge,
            "Devices that the guest has.",
        ),
        |status| status.devices.len(),
    );
    each_guest(
        page,
        snapshot,
        (
            "pciback_guest_failed_devices",
            Kind::Gauge,
            "Devices that the guest could not be given.",
        ),
        |status| status.failed.len(),
    );
    each_guest(
        page,
        snapshot,
        (
            "pciback_dropped_writes_total",
            Kind::Counter,
            "Writes that no rule lets through: they succeeded and did not reach the device.",
        ),
        |status| status.counts.dropped,
    );
}

/// As [`each_guest`], for each of several values of one more label.
fn each_kind<'a, I: Iterator<Item = (&'static str, u64)>>(
    page: &mut Page,
    snapshot: &'a Snapshot,
    (name, label, help): (&str, &str, &str),
    values: impl Fn(&'a Status) -> I,
) {
    page.begin(name, Kind::Counter, help);
    for (domain, status) in &snapshot.guests {
        for (kind, value) in values(status) {
            let labels: [(&str, &dyn Display); 3] =
                [("domain", domain), ("name", &status.name), (label, &kind)];
            page.sample(name, &labels, value);
        }
    }
}

fn operations(page: &mut Page, snapshot: &Snapshot) {
    each_kind(
        page,
        snapshot,
        (
            "pciback_operations_total",
            "command",
            "Operations that the guest asked for.",
        ),
        |status| status.counts.kinds(),
    );
    each_kind(
        page,
        snapshot,
        (
            "pciback_operation_errors_total",
            "outcome",
            "Operations that were refused by the rules, failed, or were asked of functions that are not there.",
        ),
        |status| {
            let counts = &status.counts;
            [
                ("refused", counts.refused),
                ("failed", counts.failed),
                ("absent", counts.absent),
            ]
            .into_iter()
        },
    );
}

fn latency(page: &mut Page, snapshot: &Snapshot) {
    let name = "pciback_operation_duration_seconds";
    page.begin(
        name,
        Kind::Histogram,
        "How long operations took, from being found in the guest's page to the guest's being told.",
    );
    let (bucket, sum, count) = (
        format!("{name}_bucket"),
        format!("{name}_sum"),
        format!("{name}_count"),
    );
    for (domain, status) in &snapshot.guests {
        let labels: [(&str, &dyn Display); 2] = [("domain", domain), ("name", &status.name)];
        let [domain, guest] = labels;
        let mut until = 0u64;
        for (bound, operations) in status.counts.latency() {
            until = until.wrapping_add(operations);
            let bound = bound.map_or("+Inf".to_owned(), |bound| seconds(bound).to_string());
            page.sample(&bucket, &[domain, guest, ("le", &bound)], until);
        }
        page.sample(&sum, &labels, seconds(status.counts.sum));
        page.sample(&count, &labels, until);
    }
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use xenbus::pciif::Command;

    use super::*;
    use crate::session::meter::Meter;
    use crate::session::operation::Outcome;

    fn device(bus: u8, phase: Phase, resets: u32) -> HiddenDevice {
        HiddenDevice {
            bdf: Bdf::from_devfn(0, bus, 0),
            phase: Some(phase),
            resets,
            errors: [(Severity::NonFatal, 7), (Severity::Fatal, 1)],
            stopped_dma: 5,
        }
    }

    fn snapshot() -> Snapshot {
        let meter = Meter::default();
        let (read, write) = (Some(Command::ConfRead), Some(Command::ConfWrite));
        meter.count(read, Outcome::Done, Duration::from_nanos(1500));
        meter.count(read, Outcome::Absent, Duration::from_nanos(500));
        meter.count(write, Outcome::Dropped, Duration::from_secs(20));
        let web = Status {
            name: "web".into(),
            states: Some((XenbusState::Connected, XenbusState::Connected)),
            devices: vec![(Bdf::from_devfn(0, 3, 0), Bdf::from_devfn(0, 0, 0))],
            counts: meter.read(),
            ..Status::default()
        };
        let odd = Status {
            name: "a\"b\\c\nd".into(),
            ..Status::default()
        };
        Snapshot {
            version: "1.2.3",
            platform: "xen",
            started: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_500),
            guests: vec![(DomId(3), web), (DomId(4), odd)],
            devices: vec![device(3, Phase::Assigned, 2), device(4, Phase::Dead, 1)],
        }
    }

    fn has(line: &str) {
        let page = render(&snapshot());
        assert!(
            page.lines().any(|found| found == line),
            "{line} is not in\n{page}"
        );
    }

    #[test]
    fn each_metric_is_told_in_seconds_and_totals() {
        has("pciback_build_info{version=\"1.2.3\",platform=\"xen\"} 1");
        has("process_start_time_seconds 1700000000.5");
        has("pciback_devices{state=\"assigned\"} 1");
        has("pciback_devices{state=\"hidden\"} 0");
        has("pciback_devices{state=\"dead\"} 1");
        has("pciback_device_resets_total{device=\"0000:03:00.0\"} 2");
        has("pciback_device_errors_total{device=\"0000:03:00.0\",severity=\"non-fatal\"} 7");
        has("pciback_device_errors_total{device=\"0000:04:00.0\",severity=\"fatal\"} 1");
        has("pciback_device_stopped_dma_total{device=\"0000:03:00.0\"} 5");
        has("pciback_guest_connected{domain=\"3\",name=\"web\"} 1");
        has("pciback_guest_devices{domain=\"3\",name=\"web\"} 1");
        has("pciback_dropped_writes_total{domain=\"3\",name=\"web\"} 1");
        has("pciback_operations_total{domain=\"3\",name=\"web\",command=\"conf_read\"} 2");
        has("pciback_operation_errors_total{domain=\"3\",name=\"web\",outcome=\"absent\"} 1");
    }

    #[test]
    fn the_histogram_is_cumulative_and_ends_with_all() {
        let bucket = "pciback_operation_duration_seconds_bucket{domain=\"3\",name=\"web\"";
        has(&format!("{bucket},le=\"0.000001024\"}} 1"));
        has(&format!("{bucket},le=\"0.000002048\"}} 2"));
        has(&format!("{bucket},le=\"8.589934592\"}} 2"));
        has(&format!("{bucket},le=\"+Inf\"}} 3"));
        has("pciback_operation_duration_seconds_count{domain=\"3\",name=\"web\"} 3");
        has("pciback_operation_duration_seconds_sum{domain=\"3\",name=\"web\"} 20.000002");
    }

    #[test]
    fn a_guests_name_stays_in_its_label() {
        has("pciback_guest_connected{domain=\"4\",name=\"a\\\"b\\\\c\\nd\"} 0");
    }

    #[test]
    fn every_sample_belongs_to_the_metric_announced_before_it_and_none_comes_twice() {
        let page = render(&snapshot());
        let mut kinds = BTreeMap::new();
        let (mut current, mut seen) = ("", BTreeSet::new());
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(kinds.insert(name, kind), None, "{name} twice");
                assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
                current = name;
            } else if !line.starts_with('#') {
                let name = line.split(['{', ' ']).next().unwrap();
                let base = ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|end| name.strip_suffix(end));
                assert_eq!(base.unwrap_or(name), current);
                let (sample, value) = line.rsplit_once(' ').unwrap();
                assert!(seen.insert(sample), "{sample} twice");
                value.parse::<f64>().unwrap();
            }
        }
    }
}
