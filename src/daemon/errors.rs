//! Hearing of errors that devices report, and passing them on to the sessions.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use conf_space::address::Bdf;
use log::{error, warn};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use crate::host::devices::Devices;
use crate::host::errors::ErrorReports;
use crate::host::record::Phase;
use crate::rate_limit::RateLimit;
use crate::text::chain;

/// Where reports come from, and to whom they go.
#[derive(Debug)]
pub(super) struct ErrorWatch {
    devices: Arc<Devices>,
    reports: Option<Box<dyn ErrorReports>>,
    /// A guest can make its device report errors.
    log_limit: RateLimit,
}

impl ErrorWatch {
    /// Listens from now on; `token` is the event of something to [`ErrorWatch::pass_on`]. Without any way to hear of errors guests are
    /// served all the same.
    pub(super) fn start(devices: &Arc<Devices>, registry: &Registry, token: Token) -> Self {
        let reports = match devices.bus().error_reports() {
            Ok(reports) => Some(reports),
            Err(error) => {
                error!(
                    "errors of devices go unnoticed, and guests cannot recover from them: {}",
                    chain(&error)
                );
                None
            }
        };
        let reports = reports.filter(|reports| {
            let fd = reports.fd().as_raw_fd();
            let registered = registry.register(&mut SourceFd(&fd), token, Interest::READABLE);
            if let Err(error) = &registered {
                error!("errors of devices go unnoticed: {error}");
            }
            registered.is_ok()
        });
        Self {
            devices: Arc::clone(devices),
            reports,
            log_limit: RateLimit::new(10, Duration::from_secs(10)),
        }
    }

    /// Passes on what has been reported.
    pub(super) fn pass_on(&mut self) {
        let Some(listener) = &mut self.reports else {
            return;
        };
        let reported = listener.take(&assigned(&self.devices));
        for bdf in listener.take_stopped() {
            if let Some(device) = self.devices.get(bdf) {
                device.record.errors().count_stopped();
            }
        }
        match reported {
            Ok(found) => {
                for report in found {
                    if self.log_limit.allow() {
                        warn!(
                            "{} has reported a {} error",
                            report.source,
                            report.severity.name()
                        );
                    }
                    self.devices.report_error(report);
                }
            }
            Err(error) => {
                error!(
                    "errors of devices go unnoticed from now on: {error}; restart pcibackd to try again"
                );
                self.close();
            }
        }
    }

    /// Listens no more. While guests have devices, what is reported is kept for the next daemon.
    pub(super) fn close(&mut self) {
        if let Some(reports) = self.reports.take() {
            reports.close(!assigned(&self.devices).is_empty());
        }
    }
}

/// The devices that guests have, with the ports above them.
fn assigned(devices: &Devices) -> Vec<(Bdf, Vec<Bdf>)> {
    let devices_of_guests = devices
        .list()
        .into_iter()
        .filter(|device| device.record.phase() == Some(Phase::Assigned));
    devices_of_guests
        .map(|device| {
            let ports = devices.bus().ports_above(device.bdf).unwrap_or_default();
            (device.bdf, ports)
        })
        .collect()
}
