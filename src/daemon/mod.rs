//! The daemon: start-up, and the loop that starts a session for each guest.

mod assignment;
mod background;
mod driver;
mod embedded;
mod errors;
mod facade;
mod guests;
mod hiding;
mod platform;
mod reload;
mod run_dir;
mod service;
mod service_doctor;
mod service_guest;
mod service_policy;
mod service_status;
mod service_virtio;
mod service_virtual_functions;
mod topologies;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use log::{error, info, warn};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use xenbus::sim::MachineOptions;

pub use self::background::Background;
pub use self::embedded::Embedded;
pub use self::platform::Kind as PlatformKind;
pub use self::reload::{Findings, check_config};

use self::driver::SlotDriver;
use self::errors::ErrorWatch;
use self::facade::Holder;
use self::guests::Guests;
use self::platform::Platform;
use self::service::DaemonService;
use self::topologies::Topologies;
use crate::config::{Config, Live};
use crate::control::server;
use crate::facade::FacadeError;
use crate::fdstore::{FdStore, Starts};
use crate::host::devices::Devices;
use crate::host::record::RecordError;
use crate::metrics;
use crate::virtual_devices::VirtualGuests;

/// Where the daemon keeps its sockets and records unless told otherwise.
pub const DEFAULT_RUN_DIR: &str = "/run/pcibackd";

/// Where below the run directory the records of hidden devices are.
pub fn records(run_dir: &Path) -> PathBuf {
    run_dir.join("devices")
}

/// The daemon cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The kernel's own backend would serve the same guests.
    #[error(
        "the kernel's xen-pciback is loaded and would answer the same guests. Stop the guests that use it, then: modprobe -r xen-pciback. \
         To keep it away: echo 'blacklist xen-pciback' > /etc/modprobe.d/pcibackd.conf (built into the kernel: boot with \
         initcall_blacklist=xen_pcibk_init)"
    )]
    KernelBackend,
    /// Another daemon is running.
    #[error(
        "another pcibackd is running with {path}: stop it first (systemctl stop pcibackd), or give this one another --run-dir"
    )]
    Running {
        /// The directory.
        path: PathBuf,
    },
    /// The run directory cannot be used.
    #[error(
        "cannot use the run directory {path}; pcibackd runs as root, and the directory must be on a local file system"
    )]
    RunDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Xen cannot be reached.
    #[error("cannot reach Xen: pcibackd runs in dom0 (for a try without Xen: pciback demo)")]
    Xen(#[source] xenbus::XenError),
    /// xenstore cannot be reached, or has gone.
    #[error(transparent)]
    Store(#[from] xenbus::xenstore::Error),
    /// The records of hidden devices cannot be used.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// The PCI drivers' directory cannot be opened.
    #[error(transparent)]
    Facade(#[from] FacadeError),
    /// The embedded platform cannot be set up.
    #[error("cannot set up the embedded platform")]
    Sim(#[source] xenbus::sim::MachineError),
    /// A system call failed that does not fail in a healthy system.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What the command line says.
#[derive(Debug, Clone)]
pub struct Options {
    /// The configuration.
    pub config: Config,
    /// Real Xen or the embedded one.
    pub platform: PlatformKind,
    /// What an embedded Xen is like.
    pub machine: MachineOptions,
    /// Sockets, lock and records.
    pub run_dir: PathBuf,
    /// It runs in a mount namespace of its own: a facade for everybody is laid from outside (`pciback facade`).
    pub sandboxed: bool,
    /// Who starts what keeps descriptors over a restart.
    pub fdstore: Starts,
}

const STORE: Token = Token(0);
const STOP: Token = Token(1);
const SESSIONS: Token = Token(2);
const KEEPER: Token = Token(3);
const HOST: Token = Token(4);
const ERRORS: Token = Token(5);
const RELOAD: Token = Token(6);
const DOMAINS: Token = Token(7);

/// Runs the daemon until it is told to stop. Guests keep their devices then: the next daemon goes on.
///
/// # Errors
/// [`DaemonError`].
pub fn run(options: Options) -> Result<(), DaemonError> {
    let _lock = run_dir::take(&options.run_dir)?;
    // Before any thread, so that all of them leave the signals to us.
    let wait_for = |signals: &[Signal]| {
        wait_for(signals).map_err(|source| DaemonError::System {
            action: "wait for signals",
            source,
        })
    };
    let stop = wait_for(&[Signal::SIGTERM, Signal::SIGINT])?;
    let reload = wait_for(&[Signal::SIGHUP])?;
    let signals = Signals {
        stop: stop.as_fd(),
        reload: reload.as_fd(),
    };
    let machine = options.machine.clone();
    let platform = Platform::start(options.platform, &options.run_dir, machine)?;
    let running = serve(options, &platform, signals, || {
        // Without systemd there is nobody to tell.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    })?;
    // The process is about to end. A guest's operation that takes long is not waited for: the next daemon carries it out again.
    std::mem::forget(running);
    if let Ok(Some(signal)) = stop.read_signal() {
        info!(
            "stopping on signal {}; guests keep their devices and are served again when pcibackd starts",
            signal.ssi_signo
        );
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    Ok(())
}

/// What goes on after [`serve`] has returned. Dropping it ends it, once the operations under way are done.
struct Running {
    guests: Arc<Guests>,
    virtual_guests: Arc<VirtualGuests>,
    _control: server::Server,
    _metrics: Option<metrics::server::Server>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.guests.end_sessions();
        self.virtual_guests.end_sessions();
    }
}

/// What the daemon is told from outside.
#[derive(Debug, Clone, Copy)]
struct Signals<'a> {
    /// Readable: to stop.
    stop: BorrowedFd<'a>,
    /// Readable, without blocking: to read its configuration again.
    reload: BorrowedFd<'a>,
}

/// Serves until it is told to stop. `ready` is called when guests and commands are served.
fn serve(
    options: Options,
    platform: &Platform,
    signals: Signals<'_>,
    ready: impl FnOnce(),
) -> Result<Running, DaemonError> {
    let Options {
        config,
        platform: kind,
        run_dir,
        sandboxed,
        fdstore,
        machine: _,
    } = options;
    let live = Arc::new(Live::new(config));
    let topologies = Topologies::take_up(&run_dir, Arc::clone(&live));
    let config = live.get();
    let system = |action| move |source| DaemonError::System { action, source };
    // Before the devices are looked at, so that nothing goes in between.
    let changes = platform
        .bus
        .changes()
        .map_err(system("listen to the kernel's announcements of devices"))?;
    let devices = Devices::open(
        Arc::clone(&platform.bus),
        Arc::clone(&platform.xen),
        Arc::clone(&live),
        records(&run_dir),
    )?;

    let mut poll = Poll::new().map_err(system("wait for events"))?;
    let waker =
        Arc::new(Waker::new(poll.registry(), SESSIONS).map_err(system("wait for sessions"))?);
    let guests = Guests::new(
        Arc::clone(&platform.xen),
        Arc::clone(&devices),
        Arc::clone(&waker),
    );
    // Guests wait for us, and give an operation up after two seconds: their sessions begin before all else that takes time.
    let virtual_guests = Arc::new(VirtualGuests::new(
        Arc::clone(&platform.xen),
        Arc::clone(&live),
        run_dir.join("virtual"),
        FdStore::new(&run_dir, fdstore),
        Arc::clone(&waker),
    ));
    let mut watcher = guests.watch()?;
    guests.release_orphans(&mut watcher)?;
    guests.follow(&mut watcher)?;
    // What these do with disks of xl's may wait for storage.
    let mut domains = virtual_guests.watch()?;

    let driver = Arc::new(SlotDriver::new(
        Arc::clone(&devices),
        Arc::clone(&platform.xen),
    ));
    let mut facade = Holder::new(platform.drivers.clone(), Arc::clone(&driver), sandboxed);
    facade.follow(&config, poll.registry());
    let service = DaemonService {
        started: SystemTime::now(),
        platform: kind,
        facade: Arc::clone(facade.standing()),
        devices: Arc::clone(&devices),
        guests: Arc::clone(&guests),
        virtual_guests: Arc::clone(&virtual_guests),
        driver,
        drivers: platform.drivers.clone(),
        topologies,
    };
    let service = Arc::new(service);
    let mut metrics = serve_metrics(&run_dir, &config, &service);
    let answering = Arc::clone(&service);
    let control = server::start(&run_dir, answering).map_err(|source| DaemonError::RunDir {
        path: run_dir.clone(),
        source,
    })?;

    let registry = poll.registry();
    let register =
        |fd: i32, token| registry.register(&mut SourceFd(&fd), token, Interest::READABLE);
    register(watcher.as_fd().as_raw_fd(), STORE).map_err(system("wait for xenstore"))?;
    register(domains.as_fd().as_raw_fd(), DOMAINS).map_err(system("wait for domains"))?;
    register(signals.stop.as_raw_fd(), STOP).map_err(system("wait for its end"))?;
    register(signals.reload.as_raw_fd(), RELOAD).map_err(system("wait for signals"))?;

    for warning in &config.warnings {
        warn!("configuration: {warning}");
    }
    register(changes.as_raw_fd(), HOST).map_err(system("wait for devices"))?;

    // Ready when that is done: what is started after us may count on the devices. Guests that come meanwhile are served.
    let hidden = hiding::start(Arc::clone(&config), Arc::clone(&devices), waker)
        .map_err(system("hide devices"))?;
    let mut ready = Some(ready);

    let mut errors = ErrorWatch::start(&devices, poll.registry(), ERRORS);
    let mut events = Events::with_capacity(8);
    loop {
        guests.follow(&mut watcher)?;
        virtual_guests.follow(&mut domains)?;
        let due = [guests.next_sweep(), virtual_guests.next_scan()];
        let pause = due.into_iter().flatten().min();
        let pause = pause.map(|at| at.saturating_duration_since(Instant::now()));
        match poll.poll(&mut events, pause) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other.map_err(system("wait for events"))?,
        }
        if events.is_empty() {
            guests.sweep();
        }
        for event in &events {
            match event.token() {
                STOP => {
                    errors.close();
                    return Ok(Running {
                        guests,
                        virtual_guests,
                        _control: control,
                        _metrics: metrics,
                    });
                }
                SESSIONS => {
                    guests.sweep();
                    if hidden.load(Ordering::Acquire)
                        && let Some(ready) = ready.take()
                    {
                        info!("pcibackd {} is ready", env!("CARGO_PKG_VERSION"));
                        ready();
                    }
                }
                RELOAD => {
                    drain(signals.reload);
                    let before = live.get();
                    let hidden = devices.list();
                    let names = hidden.iter().map(|device| device.description.names());
                    reload::reload(&live, &names.collect::<Vec<_>>());
                    let now = live.get();
                    if now.metrics != before.metrics {
                        // The old one first: both have the same socket.
                        drop(metrics.take());
                        metrics = serve_metrics(&run_dir, &now, &service);
                    }
                    facade.follow(&now, poll.registry());
                    if now.hide != before.hide {
                        hiding::follow(before, now, Arc::clone(&devices));
                    }
                }
                HOST => {
                    drain(changes.as_fd());
                    devices.look_for_removed();
                }
                KEEPER => facade.revive_keeper(poll.registry()),
                ERRORS => errors.pass_on(),
                _ => {}
            }
        }
    }
}

/// What is announced does not matter, only that something is: what has changed is looked up.
fn drain(changes: BorrowedFd<'_>) {
    let mut buffer = [0; 8192];
    loop {
        match nix::unistd::read(changes, &mut buffer) {
            // Some were lost.
            Err(Errno::ENOBUFS | Errno::EINTR) => {}
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

fn wait_for(signals: &[Signal]) -> io::Result<SignalFd> {
    let mask: SigSet = signals.iter().copied().collect();
    mask.thread_block()?;
    Ok(SignalFd::with_flags(
        &mask,
        SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
    )?)
}

/// A daemon without metrics still serves its guests: say so and go on.
fn serve_metrics(
    run_dir: &Path,
    config: &Config,
    service: &Arc<DaemonService>,
) -> Option<metrics::server::Server> {
    let service = Arc::clone(service);
    let page = move || metrics::text::render(&service.metrics());
    metrics::server::start(run_dir, config.metrics, page)
        .inspect_err(|error| error!("there are no metrics: {error}"))
        .ok()
}

/// Locks a mutex whose holder cannot have left it inconsistent.
fn lock_of<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
