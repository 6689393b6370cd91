//! Serving a mounted facade.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use fuser::{Config, Session, SessionACL};

use super::filesystem::Filesystem;
use super::{Driver, FacadeError, RealDrivers};

/// Linux asks its first question at the mount; a descriptor that nobody mounted is never asked anything.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const STACK: usize = 256 * 1024;

/// A facade being served, on threads of its own, until it is unmounted or its mount namespace is gone. Dropping this does not end it.
#[derive(Debug)]
pub struct Server {
    thread: JoinHandle<()>,
}

impl Server {
    /// Whether the facade is gone.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

/// Serves the facade whose descriptor [`super::mount_here`] returned, in this process or another. Returns once Linux has been answered.
///
/// # Errors
/// [`FacadeError::Serve`] for a descriptor that is not a fresh mount's.
pub fn serve(
    fuse: OwnedFd,
    driver: Arc<dyn Driver>,
    real: RealDrivers,
) -> Result<Server, FacadeError> {
    let (answered, answer) = mpsc::channel();
    let work = move || {
        let path = real.path().to_owned();
        let mut config = Config::default();
        // as in sysfs, everybody may look
        config.acl = SessionACL::All;
        config.n_threads = Some(1);
        match Session::from_fd(Filesystem::new(driver, real), fuse, SessionACL::All, config) {
            Err(error) => drop(answered.send(Err(error))),
            Ok(session) => {
                drop(answered.send(Ok(())));
                match session.run() {
                    Ok(()) => log::info!("facade over {}: unmounted", path.display()),
                    Err(error) => log::error!("facade over {}: {error}", path.display()),
                }
            }
        }
    };
    let thread = thread::Builder::new()
        .name("facade".into())
        .stack_size(STACK)
        .spawn(work)
        .map_err(FacadeError::Serve)?;
    match answer.recv_timeout(HANDSHAKE_TIMEOUT) {
        Ok(Ok(())) => Ok(Server { thread }),
        Ok(Err(error)) => Err(FacadeError::Serve(error)),
        Err(RecvTimeoutError::Timeout) => {
            Err(FacadeError::Serve(std::io::ErrorKind::TimedOut.into()))
        }
        Err(RecvTimeoutError::Disconnected) => {
            Err(FacadeError::Serve(std::io::ErrorKind::UnexpectedEof.into()))
        }
    }
}
