//! Machine and daemon, and how the story asks them.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use conf_space::{Bdf, Width};
use pcibackd::config::Config;
use pcibackd::control::protocol::{DaemonStatus, DeviceLine, Entry, Request, Response};
use pcibackd::daemon::Embedded;
use pcibackd::host::devices::for_xen;
use pcibackd::host::sim::SimBus;
use pcibackd::host::{Bus, Function};
use tempfile::TempDir;
use xenbus::DomId;
use xenbus::sim::{Machine, MachineOptions};

use super::timeline::Timeline;
use super::{DemoError, tree};
use crate::daemon;

/// How long anything may take before the demonstration gives up.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A machine with a daemon on it, in this process.
#[derive(Debug)]
pub struct Stage {
    /// Tells what happens.
    pub timeline: Timeline,
    embedded: Embedded,
    run_dir: TempDir,
}

impl Stage {
    /// Starts both.
    pub fn new(timeline: Timeline) -> Result<Self, DemoError> {
        let run_dir = tempfile::Builder::new()
            .prefix("pciback-demo-")
            .tempdir()
            .map_err(DemoError::Directory)?;
        let options = MachineOptions {
            toolstack_timeout: PATIENCE,
            ..MachineOptions::default()
        };
        let embedded = Embedded::start(run_dir.path().to_owned(), Config::default(), options)?;
        Ok(Self {
            timeline,
            embedded,
            run_dir,
        })
    }

    /// Stops the daemon.
    pub fn end(self) -> Result<(), DemoError> {
        Ok(self.embedded.stop()?)
    }

    /// Xen, xenstore and the toolstack.
    pub fn machine(&self) -> &Machine {
        self.embedded.machine()
    }

    /// The machine's devices.
    pub fn bus(&self) -> &SimBus {
        self.embedded.bus()
    }

    /// The daemon's control socket and its records.
    pub fn run_dir(&self) -> &std::path::Path {
        self.run_dir.path()
    }

    fn ask<T>(
        &self,
        request: &Request,
        expected: impl FnOnce(Response) -> Option<T>,
    ) -> Result<T, DemoError> {
        Ok(daemon::ask(self.run_dir.path(), request, expected).map_err(Box::new)?)
    }

    /// As `pciback hide`.
    pub fn hide(&self, bdf: Bdf) -> Result<Vec<Entry>, DemoError> {
        let request = Request::Hide {
            devices: vec![bdf.to_string()],
            force: false,
        };
        self.ask(&request, entries)
    }

    /// As `pciback unhide`.
    pub fn unhide(&self, bdf: Bdf) -> Result<Vec<Entry>, DemoError> {
        let request = Request::Unhide {
            devices: vec![bdf.to_string()],
            force: false,
        };
        self.ask(&request, entries)
    }

    /// As `pciback list`.
    pub fn list(&self) -> Result<BTreeMap<Bdf, DeviceLine>, DemoError> {
        let devices = self.ask(&Request::List, |response| match response {
            Response::Devices { devices } => Some(devices),
            _ => None,
        })?;
        Ok(devices
            .into_iter()
            .map(|line| (line.device, line))
            .collect())
    }

    /// One line of it.
    pub fn line(&self, bdf: Bdf) -> Result<Option<DeviceLine>, DemoError> {
        Ok(self.list()?.remove(&bdf))
    }

    /// As `pciback status`.
    pub fn status(&self) -> Result<DaemonStatus, DemoError> {
        self.ask(&Request::Status, |response| match response {
            Response::Status(status) => Some(status),
            _ => None,
        })
    }

    /// Waits until a device is in that state. Gives how long that took.
    pub fn wait_for_state(&self, bdf: Bdf, state: &str) -> Result<Duration, DemoError> {
        self.wait_until(&format!("{bdf} {state}"), || {
            Ok(self.line(bdf)?.is_some_and(|line| line.state == state))
        })
    }

    /// Waits until something is so. Gives how long that took.
    pub fn wait_until(
        &self,
        what: &str,
        mut so: impl FnMut() -> Result<bool, DemoError>,
    ) -> Result<Duration, DemoError> {
        let start = Instant::now();
        while !so()? {
            let waited = start.elapsed();
            if waited > PATIENCE {
                let what = what.to_owned();
                return Err(DemoError::Waited { what, waited });
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(start.elapsed())
    }

    /// Whose DMA a device's is.
    pub fn owner(&self, bdf: Bdf) -> Option<DomId> {
        self.machine().device_owner(for_xen(bdf))
    }

    /// The same in words.
    pub fn owner_name(&self, bdf: Bdf) -> String {
        match self.owner(bdf) {
            None => "nobody's".to_owned(),
            Some(DomId::DOM0) => "dom0's".to_owned(),
            Some(DomId::IO) => "quarantined".to_owned(),
            Some(guest) => format!("domain {guest}'s"),
        }
    }

    /// A device's whole configuration space, as the hardware has it. What cannot be read is `None`.
    pub fn config(&self, bdf: Bdf) -> Result<Vec<Option<u32>>, DemoError> {
        let size = self.bus().describe(bdf)?.identity.config_size;
        let config = self.bus().open(bdf)?;
        let offsets = (0..size.bytes()).step_by(4);
        Ok(offsets
            .map(|offset| config.read(offset, Width::Four).ok())
            .collect())
    }

    /// Prints the host's buses.
    pub fn show_host(&self) -> Result<(), DemoError> {
        let devices: Vec<DeviceLine> = self.list()?.into_values().collect();
        let mut physical = BTreeMap::new();
        for device in &devices {
            if let Function::Virtual { physical: of, .. } =
                self.bus().describe(device.device)?.function
            {
                physical.insert(device.device, of);
            }
        }
        for bus in tree::host(&devices, &physical) {
            self.timeline.print(&bus.render());
        }
        Ok(())
    }
}

fn entries(response: Response) -> Option<Vec<Entry>> {
    match response {
        Response::Entries { entries } => Some(entries),
        _ => None,
    }
}
