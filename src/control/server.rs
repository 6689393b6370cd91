//! The daemon's end of the control socket. Each connection has a thread of its own, since hiding a device may take a minute.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};

use super::SOCKET;
use super::protocol::{Request, Response};
use super::traced::Filter;
use crate::rights;

/// Who answers.
pub trait Service: Send + Sync + 'static {
    /// Answers one request. `fd` is what came with it.
    fn answer(&self, request: Request, fd: Option<OwnedFd>) -> Response;

    /// [`Response::Served`] was the answer: the client may keep the connection, to hear of our end.
    fn served(&self, client: &Arc<UnixStream>);

    /// Answers [`Request::Trace`], until the client goes or `stop` is set.
    ///
    /// # Errors
    /// The client's socket's.
    fn trace(&self, filter: &Filter, client: &UnixStream, stop: &AtomicBool) -> io::Result<()>;
}

/// Connections at a time. More are refused: a script gone wild shall not exhaust the daemon.
const MAX_CONNECTIONS: usize = 32;
/// The longest request. Lists of devices are long, but not that long.
const MAX_REQUEST: usize = 256 * 1024;
/// A connection that sends nothing, or takes no answer, is closed after this time.
const IDLE: Duration = Duration::from_secs(10);
const STACK: usize = 256 * 1024;

/// An open control socket.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    /// Takes no more commands. One that is being carried out is carried on with.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Err(error) = shutdown(self.listener.as_raw_fd(), Shutdown::Both) {
            log::error!("control socket: {error}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the control socket's thread has panicked; please report this");
        }
    }
}

/// Opens the socket and answers on threads of its own.
///
/// # Errors
/// When the socket cannot be made.
pub fn start(run_dir: &Path, service: Arc<dyn Service>) -> io::Result<Server> {
    let path = run_dir.join(SOCKET);
    // One daemon at a time holds the run directory, so what is there is of one that has died.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    let stop = Arc::new(AtomicBool::new(false));
    let thread = thread::Builder::new()
        .name("control".into())
        .stack_size(STACK)
        .spawn({
            let (listener, stop) = (listener.try_clone()?, Arc::clone(&stop));
            move || listen(&listener, &service, &stop)
        })?;
    Ok(Server {
        listener,
        stop,
        thread: Some(thread),
    })
}

fn listen(listener: &UnixListener, service: &Arc<dyn Service>, stop: &Arc<AtomicBool>) {
    let count = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            _ if stop.load(Ordering::Acquire) => return,
            Ok(stream) => stream,
            Err(error) => {
                log::warn!("control socket: {error}");
                // Out of descriptors, most likely: waiting is all that helps.
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if count.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
            count.fetch_sub(1, Ordering::AcqRel);
            log::warn!(
                "control socket: more than {MAX_CONNECTIONS} commands at a time; refusing one"
            );
            continue;
        }
        let (service, counted, stop) = (Arc::clone(service), Arc::clone(&count), Arc::clone(stop));
        let work = move || {
            if let Err(error) = converse(stream, &*service, &stop, IDLE) {
                log::debug!("control socket: {error}");
            }
            counted.fetch_sub(1, Ordering::AcqRel);
        };
        if let Err(error) = thread::Builder::new()
            .name("command".into())
            .stack_size(STACK)
            .spawn(work)
        {
            count.fetch_sub(1, Ordering::AcqRel);
            log::warn!("control socket: {error}");
        }
    }
}

fn converse(
    stream: UnixStream,
    service: &dyn Service,
    stop: &AtomicBool,
    idle: Duration,
) -> io::Result<()> {
    stream.set_read_timeout(Some(idle))?;
    stream.set_write_timeout(Some(idle))?;
    let stream = Arc::new(stream);
    loop {
        let (line, fd) = receive(&stream)?;
        if line.is_empty() {
            return Ok(());
        }
        let response = match serde_json::from_slice(&line) {
            Ok(Request::Trace(filter)) => return service.trace(&filter, &stream, stop),
            Ok(request) => service.answer(request, fd),
            Err(error) => Response::Failed {
                message: format!(
                    "pcibackd {} does not understand the request ({error}); use the pciback of the same version",
                    env!("CARGO_PKG_VERSION")
                ),
            },
        };
        let served = matches!(response, Response::Served);
        let mut line = serde_json::to_vec(&response)?;
        line.push(b'\n');
        (&*stream).write_all(&line)?;
        if served {
            stream.set_read_timeout(None)?;
            service.served(&stream);
        }
    }
}

/// One line without its end, and what came with it; an empty line at the end of the connection.
fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut line = Vec::new();
    let mut fd = None;
    loop {
        let mut buffer = [0; 4096];
        let (received, fds) = rights::receive(stream, &mut buffer)?;
        fd = fds.into_iter().last().or(fd);
        let Some(part) = buffer.get(..received).filter(|part| !part.is_empty()) else {
            return Ok((line, fd));
        };
        line.extend_from_slice(part);
        if line.last() == Some(&b'\n') {
            line.pop();
            return Ok((line, fd));
        }
        if line.len() > MAX_REQUEST {
            return Err(io::Error::other("a request that does not end"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Talkative;

    impl Service for Talkative {
        fn answer(&self, _: Request, _: Option<OwnedFd>) -> Response {
            let message = "x".repeat(1 << 20);
            Response::Failed { message }
        }

        fn served(&self, _: &Arc<UnixStream>) {}

        fn trace(&self, _: &Filter, _: &UnixStream, _: &AtomicBool) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn one_who_asks_and_does_not_take_the_answer_is_not_waited_for() {
        let (mut asker, ours) = UnixStream::pair().unwrap();
        asker.write_all(b"{\"request\":\"list\"}\n").unwrap();
        let error = converse(
            ours,
            &Talkative,
            &AtomicBool::new(false),
            Duration::from_millis(10),
        )
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
    }
}
