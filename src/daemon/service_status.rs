//! How the daemon and its guests are: the answer to [`Request::Status`](crate::control::protocol::Request::Status), and the metrics.

use std::time::Duration;

use conf_space::address::Bdf;
use xenbus::{DomId, XenbusState};

use super::service::DaemonService;
use crate::control::protocol::{
    Bucket, DaemonStatus, DeviceErrors, Errors, GuestLine, Latency, Response,
};
use crate::host::devices::Device;
use crate::host::errors::Severity;
use crate::host::record::Phase;
use crate::metrics::text::{HiddenDevice, Snapshot};
use crate::session::Status;
use crate::session::aer::recovery::Recovery;
use crate::session::meter::Counts;

impl DaemonService {
    pub(super) fn status(&self) -> Response {
        let guests = self.guests.status().into_iter();
        let devices = self.devices.list().into_iter();
        Response::Status(DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            platform: self.platform.name().to_owned(),
            facade: self.facade.state().to_owned(),
            uptime_seconds: self.started.elapsed().unwrap_or_default().as_secs(),
            dead: devices
                .filter(|device| device.record.phase() == Some(Phase::Dead))
                .map(|device| device.bdf)
                .collect(),
            device_errors: self.with_errors(),
            guests: guests.map(guest_line).collect(),
        })
    }

    pub(super) fn metrics(&self) -> Snapshot {
        let devices = self.devices.list().into_iter();
        Snapshot {
            version: env!("CARGO_PKG_VERSION"),
            platform: self.platform.name(),
            started: self.started,
            guests: self.guests.status(),
            devices: devices
                .map(|device| HiddenDevice {
                    bdf: device.bdf,
                    phase: device.record.phase(),
                    resets: device.record.resets(),
                    errors: [Severity::NonFatal, Severity::Fatal]
                        .map(|severity| (severity, device.record.errors().counted(severity))),
                    stopped_dma: device.record.errors().stopped(),
                })
                .collect(),
        }
    }

    fn with_errors(&self) -> Vec<(Bdf, DeviceErrors)> {
        let devices = self.devices.list().into_iter();
        devices
            .map(|device| (device.bdf, self.errors_of(&device)))
            .filter(|(_, errors)| (errors.non_fatal, errors.fatal, errors.stopped_dma) != (0, 0, 0))
            .collect()
    }

    pub(super) fn errors_of(&self, device: &Device) -> DeviceErrors {
        let errors = device.record.errors();
        DeviceErrors {
            correctable: self.devices.bus().correctable_errors(device.bdf),
            non_fatal: errors.counted(Severity::NonFatal),
            fatal: errors.counted(Severity::Fatal),
            recovery: Recovery::from_bits(errors.recovery()).describe(),
            stopped_dma: errors.stopped(),
        }
    }
}

fn guest_line((domain, status): (DomId, Status)) -> GuestLine {
    let state = |state: Option<XenbusState>| {
        state.map_or_else(|| "unknown".to_owned(), |state| state.to_string())
    };
    let counts = &status.counts;
    GuestLine {
        domain: domain.0,
        name: status.name,
        backend: state(status.states.map(|(backend, _)| backend)),
        frontend: state(status.states.map(|(_, frontend)| frontend)),
        devices: status.devices,
        failed: status.failed,
        operations: counts.total(),
        kinds: counts
            .kinds()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| (name.to_owned(), count))
            .collect(),
        errors: Errors {
            dropped: counts.dropped,
            absent: counts.absent,
            refused: counts.refused,
            failed: counts.failed,
        },
        latency: latency(counts),
        traced: status.traced,
    }
}

fn latency(counts: &Counts) -> Latency {
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let buckets = counts.latency().filter(|(_, count)| *count > 0);
    Latency {
        p50_ns: nanoseconds(counts.percentile(50)),
        p99_ns: nanoseconds(counts.percentile(99)),
        max_ns: nanoseconds(counts.max),
        buckets: buckets
            .map(|(bound, operations)| Bucket {
                up_to_ns: bound.map(nanoseconds),
                operations,
            })
            .collect(),
    }
}
