//! The command line's end of the control socket.

use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::SOCKET;
use super::protocol::{Request, Response};

/// A daemon that cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no pcibackd answers at {path}; start it (systemctl start pcibackd), and ask as root")]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The daemon went away before it answered.
    #[error("pcibackd did not answer; see its log (journalctl -u pcibackd)")]
    NoAnswer(#[source] io::Error),
}

/// Asks the daemon, and waits for as long as it takes.
///
/// # Errors
/// [`ClientError`].
pub fn ask(run_dir: &Path, request: &Request) -> Result<Response, ClientError> {
    exchange(run_dir, request, None).map(|(response, _)| response)
}

/// Asks the daemon to serve the facade that `fuse` is. The connection, if it is kept, ends with the daemon.
///
/// # Errors
/// [`ClientError`].
pub fn ask_to_serve(
    run_dir: &Path,
    fuse: BorrowedFd<'_>,
) -> Result<(Response, UnixStream), ClientError> {
    exchange(run_dir, &Request::Serve, Some(fuse))
}

/// Answers that go on until one of the two ends hangs up.
#[derive(Debug)]
pub struct Answers {
    reader: BufReader<UnixStream>,
}

impl Iterator for Answers {
    type Item = Result<Response, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Err(error) => return Some(Err(ClientError::NoAnswer(error))),
            // The end; half a line is what was under way when it came.
            Ok(_) if !line.ends_with('\n') => return None,
            Ok(_) => {}
        }
        let response = serde_json::from_str(&line);
        Some(response.map_err(|error| ClientError::NoAnswer(error.into())))
    }
}

impl Answers {
    /// The connection, to be hung up from elsewhere.
    ///
    /// # Errors
    /// When there are too many open files.
    pub fn connection(&self) -> io::Result<UnixStream> {
        self.reader.get_ref().try_clone()
    }
}

/// Asks what is answered again and again.
///
/// # Errors
/// [`ClientError`].
pub fn ask_for_many(run_dir: &Path, request: &Request) -> Result<Answers, ClientError> {
    let stream = connect_and_send(run_dir, request, None)?;
    let reader = BufReader::new(stream);
    Ok(Answers { reader })
}

fn exchange(
    run_dir: &Path,
    request: &Request,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(Response, UnixStream), ClientError> {
    let stream = connect_and_send(run_dir, request, fd)?;
    let mut line = String::new();
    BufReader::new(&stream)
        .read_line(&mut line)
        .map_err(ClientError::NoAnswer)?;
    let response =
        serde_json::from_str(&line).map_err(|error| ClientError::NoAnswer(error.into()))?;
    Ok((response, stream))
}

fn connect_and_send(
    run_dir: &Path,
    request: &Request,
    fd: Option<BorrowedFd<'_>>,
) -> Result<UnixStream, ClientError> {
    let path = run_dir.join(SOCKET);
    let mut stream =
        UnixStream::connect(&path).map_err(|source| ClientError::NoDaemon { path, source })?;
    send(&mut stream, request, fd).map_err(ClientError::NoAnswer)?;
    Ok(stream)
}

fn send(stream: &mut UnixStream, request: &Request, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let fds: Vec<i32> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let messages: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&line)],
        messages,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    stream.write_all(line.get(sent..).unwrap_or_default())
}
