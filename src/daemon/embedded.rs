//! The daemon on an embedded Xen with simulated devices, all in this process: for demonstrations and tests.

use std::path::PathBuf;
use std::sync::Arc;

use xenbus::sim::{Machine, MachineOptions};

use super::{Background, DaemonError};
use crate::config::Config;
use crate::host::sim::SimBus;

/// A running daemon, and what it runs on.
#[derive(Debug)]
pub struct Embedded {
    machine: Machine,
    bus: Arc<SimBus>,
    daemon: Background,
}

impl Embedded {
    /// Starts an embedded machine with the example devices, and a daemon on it, and waits until that serves guests and commands.
    /// All sockets and records are in `run_dir`.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn start(
        run_dir: PathBuf,
        config: Config,
        options: MachineOptions,
    ) -> Result<Self, DaemonError> {
        let machine = Machine::with_options(&run_dir, options).map_err(DaemonError::Sim)?;
        let bus = SimBus::with_example_devices(&machine);
        let daemon = Background::start(
            Arc::new(machine.clone()),
            Arc::clone(&bus) as _,
            run_dir,
            config,
        )?;
        Ok(Self {
            machine,
            bus,
            daemon,
        })
    }

    /// The machine: its hypervisor, its xenstore, its toolstack.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The devices of the machine.
    pub fn bus(&self) -> &Arc<SimBus> {
        &self.bus
    }

    /// Stops the daemon, as a signal does. Guests keep their devices.
    ///
    /// # Errors
    /// What ended it before.
    pub fn stop(self) -> Result<(), DaemonError> {
        self.daemon.stop()
    }
}
