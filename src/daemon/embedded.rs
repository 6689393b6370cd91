//! The daemon on threads of another program, on an embedded Xen with simulated devices: for demonstrations and tests.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::{Arc, mpsc::Receiver};
use std::thread::{self, JoinHandle};

use xenbus::sim::{Machine, MachineOptions};

use super::platform::{Kind, Platform};
use super::{DaemonError, Options, lock, serve};
use crate::config::Config;
use crate::host::sim::SimBus;

/// A running daemon, and what it runs on.
#[derive(Debug)]
pub struct Embedded {
    machine: Machine,
    bus: Arc<SimBus>,
    /// The daemon ends when this does.
    stop: UnixStream,
    thread: Option<JoinHandle<Result<(), DaemonError>>>,
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
        let system = |action| move |source| DaemonError::System { action, source };
        let machine = Machine::with_options(&run_dir, options).map_err(DaemonError::Sim)?;
        let bus = SimBus::with_example_devices(&machine);
        let (stop, stopped) = UnixStream::pair().map_err(system("make a pair of sockets"))?;
        let (tell_ready, ready) = mpsc::channel();
        let thread = {
            let platform = Platform::embedded(&machine, Arc::clone(&bus) as _);
            let daemon = move || {
                let _lock = lock(&run_dir)?;
                let options = Options {
                    config,
                    platform: Kind::Sim,
                    run_dir,
                };
                serve(options, &platform, stopped.as_fd(), move || {
                    // Whoever started us waits for it.
                    let _ = tell_ready.send(());
                })
            };
            thread::Builder::new()
                .name("daemon".into())
                .spawn(daemon)
                .map_err(system("start the daemon's thread"))?
        };
        let mut embedded = Self {
            machine,
            bus,
            stop,
            thread: Some(thread),
        };
        embedded.wait_until_ready(&ready)?;
        Ok(embedded)
    }

    fn wait_until_ready(&mut self, ready: &Receiver<()>) -> Result<(), DaemonError> {
        match ready.recv() {
            Ok(()) => Ok(()),
            // It ended before it was ready.
            Err(_) => self.end(),
        }
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
    pub fn stop(mut self) -> Result<(), DaemonError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), DaemonError> {
        // It may have ended by itself.
        let _ = self.stop.shutdown(Shutdown::Both);
        match self.thread.take().map(JoinHandle::join) {
            None | Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(error))) => Err(error),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::error!("{}", crate::text::chain(&error));
        }
    }
}
