//! The daemon on threads of another program, on whatever platform that has.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use xenbus::Xen;
use xenbus::sim::MachineOptions;

use super::platform::{Kind, Platform};
use super::{DaemonError, Options, Signals, run_dir, serve};
use crate::config::Config;
use crate::facade::RealDrivers;
use crate::fdstore::Starts;
use crate::host::Bus;

/// A running daemon.
#[derive(Debug)]
pub struct Background {
    /// The daemon ends when this does.
    stop: UnixStream,
    /// The daemon reads its configuration again when something comes from here.
    reload: UnixStream,
    thread: Option<JoinHandle<Result<(), DaemonError>>>,
}

impl Background {
    /// Starts a daemon, and waits until it serves guests and commands. Its sockets and records are in `run_dir`.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn start(
        xen: Arc<dyn Xen>,
        bus: Arc<dyn Bus>,
        run_dir: PathBuf,
        config: Config,
    ) -> Result<Self, DaemonError> {
        Self::start_on(
            Platform {
                xen,
                bus,
                drivers: None,
            },
            run_dir,
            config,
        )
    }

    /// As [`Background::start`], with a facade over these drivers of PCI devices if the configuration wants one.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn start_with_drivers(
        xen: Arc<dyn Xen>,
        bus: Arc<dyn Bus>,
        drivers: RealDrivers,
        run_dir: PathBuf,
        config: Config,
    ) -> Result<Self, DaemonError> {
        Self::start_on(
            Platform {
                xen,
                bus,
                drivers: Some(drivers),
            },
            run_dir,
            config,
        )
    }

    fn start_on(platform: Platform, run_dir: PathBuf, config: Config) -> Result<Self, DaemonError> {
        let system = |action| move |source| DaemonError::System { action, source };
        let (stop, stopped) = UnixStream::pair().map_err(system("make a pair of sockets"))?;
        let (reload, told_to_reload) =
            UnixStream::pair().map_err(system("make a pair of sockets"))?;
        told_to_reload
            .set_nonblocking(true)
            .map_err(system("make a pair of sockets"))?;
        let (tell_ready, ready) = mpsc::channel();
        let daemon = move || {
            let _lock = run_dir::take(&run_dir)?;
            let options = Options {
                config,
                platform: Kind::Sim,
                run_dir,
                sandboxed: false,
                // This program is another one.
                fdstore: Starts::Others,
                machine: MachineOptions::default(),
            };
            let signals = Signals {
                stop: stopped.as_fd(),
                reload: told_to_reload.as_fd(),
            };
            let running = serve(options, &platform, signals, move || {
                // Whoever started us waits for it.
                let _ = tell_ready.send(());
            })?;
            // Here the process goes on, so all threads are waited for.
            drop(running);
            Ok(())
        };
        let thread = thread::Builder::new()
            .name("daemon".into())
            .spawn(daemon)
            .map_err(system("start the daemon's thread"))?;
        let mut background = Self {
            stop,
            reload,
            thread: Some(thread),
        };
        background.wait_until_ready(&ready)?;
        Ok(background)
    }

    fn wait_until_ready(&mut self, ready: &Receiver<()>) -> Result<(), DaemonError> {
        match ready.recv() {
            Ok(()) => Ok(()),
            // It ended before it was ready.
            Err(_) => self.end(),
        }
    }

    /// Has the daemon read its configuration file again, as SIGHUP does. Does not wait for it.
    ///
    /// # Errors
    /// When it has ended.
    pub fn reload(&self) -> std::io::Result<()> {
        (&self.reload).write_all(&[0])
    }

    /// Stops the daemon, as a signal does, once the operations under way are done. Guests keep their devices.
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

impl Drop for Background {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::error!("{}", crate::text::chain(&error));
        }
    }
}
