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
    serve_until(fuse, driver, real, || ())
}

/// As [`serve`]; `end` runs when the facade is served no longer, for whatever reason.
pub(super) fn serve_until(
    fuse: OwnedFd,
    driver: Arc<dyn Driver>,
    real: RealDrivers,
    end: impl FnOnce() + Send + 'static,
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
        end();
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

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::unistd::{read, write};

    use super::super::tests::Memory;
    use super::*;

    /// Linux's side of the FUSE protocol (see fuse(4)): the header of a request, then its body.
    fn request(opcode: u32, body: &[u32]) -> Vec<u8> {
        let length = u32::try_from(40 + 4 * body.len()).unwrap();
        // length, opcode, unique (64), node (64), user, group, process, padding
        let header = [length, opcode, 1, 0, 1, 0, 0, 0, 0, 0];
        header
            .iter()
            .chain(body)
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    #[test]
    fn a_server_that_gives_up_says_so() {
        const INIT: u32 = 26;
        let machine = tempfile::tempdir().unwrap();
        for directory in ["devices", "drivers"] {
            std::fs::create_dir(machine.path().join(directory)).unwrap();
        }
        let real = RealDrivers::open_at(&machine.path().join("drivers")).unwrap();
        let kind = SockType::SeqPacket;
        let (linux, fuse) = socketpair(AddressFamily::Unix, kind, None, SockFlag::empty()).unwrap();
        // protocol 7.31, a page of read-ahead, no capabilities
        write(&linux, &request(INIT, &[7, 31, 4096, 0])).unwrap();
        let (ended, end) = mpsc::channel();
        let driver = Arc::new(Memory::default());
        let server = serve_until(fuse, driver, real, move || ended.send(()).unwrap()).unwrap();
        let mut answer = [0; 256];
        assert!(read(&linux, &mut answer).unwrap() > 16);
        assert_eq!(answer.get(4..8), Some(&[0; 4][..]), "no error");
        assert!(!server.is_finished());

        write(&linux, b"not FUSE").unwrap();
        end.recv_timeout(HANDSHAKE_TIMEOUT).unwrap();
    }
}
