//! The little of HTTP/1.0 that a scrape needs (RFC 1945), on one thread that waits for nobody: it serves a few connections at a time, each
//! for a few seconds at most.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{error, info, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Loopback, SOCKET};

/// Connections at a time. More wait until one of these is done.
const CONNECTIONS: usize = 8;
/// From connecting to having read the last byte.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 300 } else { 5000 });
/// The longest request; a scraper's is a few hundred bytes.
const LONGEST_REQUEST: usize = 8 * 1024;
/// When there are no descriptors left for one more connection.
const PAUSE: Duration = Duration::from_millis(100);
const STACK: usize = 256 * 1024;

/// Serves metrics until it is dropped.
#[derive(Debug)]
pub struct Server {
    /// The thread ends when this does.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the metrics' thread has panicked; please report this");
        }
    }
}

/// Serves what `page` makes. A socket that cannot be had is told of, and the rest goes on: guests come first.
///
/// # Errors
/// When there is no memory or file descriptor for it.
pub fn start(
    run_dir: &Path,
    port: Option<Loopback>,
    page: impl Fn() -> String + Send + 'static,
) -> io::Result<Server> {
    let mut listeners: Vec<Box<dyn Listen>> = Vec::new();
    let path = run_dir.join(SOCKET);
    match listen_at(&path) {
        Ok(listener) => listeners.push(Box::new(listener)),
        Err(error) => warn!("no metrics at {}: {error}", path.display()),
    }
    if let Some(port) = port {
        let bound = TcpListener::bind(port.get())
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
        match bound {
            Ok(listener) => {
                info!("metrics at http://{port}/metrics");
                listeners.push(Box::new(listener));
            }
            Err(error) => {
                warn!("no metrics at {port}: {error}; choose a port that nobody else has")
            }
        }
    }
    let (stop, stopped) = UnixStream::pair()?;
    let thread = thread::Builder::new()
        .name("metrics".into())
        .stack_size(STACK)
        .spawn(move || {
            if let Err(error) = serve(&listeners, &stopped, &page) {
                error!("metrics are no longer served: {error}");
            }
        })?;
    Ok(Server {
        stop: Some(stop),
        thread: Some(thread),
    })
}

fn listen_at(path: &Path) -> io::Result<UnixListener> {
    // One daemon at a time holds the run directory, so what is there is of one that has died.
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Where connections come from.
trait Listen: Send {
    fn fd(&self) -> BorrowedFd<'_>;
    fn next(&self) -> io::Result<Box<dyn Socket>>;
}

/// A connection, which never blocks.
trait Socket: Read + Write + AsFd {}

impl Socket for UnixStream {}
impl Socket for TcpStream {}

impl Listen for UnixListener {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn next(&self) -> io::Result<Box<dyn Socket>> {
        let (stream, _) = self.accept()?;
        stream.set_nonblocking(true)?;
        Ok(Box::new(stream))
    }
}

impl Listen for TcpListener {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn next(&self) -> io::Result<Box<dyn Socket>> {
        let (stream, _) = self.accept()?;
        stream.set_nonblocking(true)?;
        Ok(Box::new(stream))
    }
}

fn serve(
    listeners: &[Box<dyn Listen>],
    stopped: &UnixStream,
    page: &dyn Fn() -> String,
) -> io::Result<()> {
    let mut connections: Vec<Connection> = Vec::new();
    loop {
        let full = connections.len() >= CONNECTIONS;
        if wait(listeners, stopped, &connections, full)? {
            return Ok(());
        }
        let now = Instant::now();
        connections.retain_mut(|connection| {
            connection.deadline > now && connection.go_on(page).unwrap_or(false)
        });
        for listener in listeners {
            while connections.len() < CONNECTIONS {
                match listener.next() {
                    Ok(socket) => connections.push(Connection::new(socket)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => {
                        thread::sleep(PAUSE);
                        break;
                    }
                }
            }
        }
    }
}

/// Waits until there is something to do. True: it is over.
fn wait(
    listeners: &[Box<dyn Listen>],
    stopped: &UnixStream,
    connections: &[Connection],
    full: bool,
) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
    fds.extend(connections.iter().map(|connection| {
        let wants = match connection.response {
            None => PollFlags::POLLIN,
            Some(_) => PollFlags::POLLOUT,
        };
        PollFd::new(connection.socket.as_fd(), wants)
    }));
    if !full {
        let listening = listeners.iter();
        fds.extend(listening.map(|listener| PollFd::new(listener.fd(), PollFlags::POLLIN)));
    }
    let now = Instant::now();
    let soonest = connections
        .iter()
        .map(|connection| connection.deadline)
        .min();
    let timeout = soonest.map_or(PollTimeout::NONE, |deadline| {
        // Not before the deadline: rounded up.
        let left = deadline.saturating_duration_since(now);
        PollTimeout::try_from(left.saturating_add(Duration::from_millis(1)))
            .unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let first = fds.first().and_then(PollFd::revents);
    Ok(first.is_some_and(|events| !events.is_empty()))
}

struct Connection {
    socket: Box<dyn Socket>,
    deadline: Instant,
    request: Vec<u8>,
    /// What is still to be sent, once the request is there.
    response: Option<Vec<u8>>,
    sent: usize,
}

impl Connection {
    fn new(socket: Box<dyn Socket>) -> Self {
        let now = Instant::now();
        Self {
            socket,
            deadline: now.checked_add(PATIENCE).unwrap_or(now),
            request: Vec::new(),
            response: None,
            sent: 0,
        }
    }

    /// Reads or writes as much as can be now. `false`: it is done.
    fn go_on(&mut self, page: &dyn Fn() -> String) -> io::Result<bool> {
        while self.response.is_none() {
            let mut buffer = [0; 1024];
            match self.socket.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(count) => self.request.extend(buffer.iter().take(count)),
                Err(error) => return later(&error),
            }
            if is_complete(&self.request) {
                self.response = Some(answer(&self.request, page));
            } else if self.request.len() > LONGEST_REQUEST {
                self.response = Some(response("400 Bad Request", "too long a request\n", ""));
            }
        }
        while let Some(rest) = self.response.as_ref().and_then(|all| all.get(self.sent..))
            && !rest.is_empty()
        {
            match self.socket.write(rest) {
                Ok(0) => return Ok(false),
                Ok(count) => self.sent = self.sent.saturating_add(count),
                Err(error) => return later(&error),
            }
        }
        Ok(false)
    }
}

/// Whether an error only means that it is not time yet.
fn later(error: &io::Error) -> io::Result<bool> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(true),
        kind => Err(kind.into()),
    }
}

/// The header ends with an empty line. What may follow it is of no interest.
fn is_complete(request: &[u8]) -> bool {
    let ends_at = |end: &[u8]| request.windows(end.len()).any(|part| part == end);
    ends_at(b"\r\n\r\n") || ends_at(b"\n\n")
}

fn answer(request: &[u8], page: &dyn Fn() -> String) -> Vec<u8> {
    let line = request.split(|byte| *byte == b'\n').next();
    let line = String::from_utf8_lossy(line.unwrap_or_default()).into_owned();
    let mut words = line.split_ascii_whitespace();
    let (method, target, version) = (words.next(), words.next(), words.next());
    let path = target.and_then(|target| target.split('?').next());
    match (method, path, version) {
        (_, _, None) => response("400 Bad Request", "this is HTTP\n", ""),
        (_, _, Some(version)) if !version.starts_with("HTTP/1.") => response(
            "505 HTTP Version Not Supported",
            "use HTTP/1.0 or 1.1\n",
            "",
        ),
        (Some("GET"), Some("/metrics"), _) => {
            let kind = "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n";
            response("200 OK", &page(), kind)
        }
        (Some("GET"), ..) => response("404 Not Found", "there is only /metrics\n", ""),
        _ => response("405 Method Not Allowed", "GET /metrics\n", "Allow: GET\r\n"),
    }
}

fn response(status: &str, body: &str, header: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.0 {status}\r\n{header}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct House {
        dir: tempfile::TempDir,
        server: Option<Server>,
    }

    const PAGE: &str = "some_metric 1\n";

    fn serving(page: impl Fn() -> String + Send + 'static) -> House {
        let dir = tempfile::tempdir().unwrap();
        let server = start(dir.path(), None, page).unwrap();
        House {
            dir,
            server: Some(server),
        }
    }

    impl House {
        fn connect(&self) -> UnixStream {
            UnixStream::connect(self.dir.path().join(SOCKET)).unwrap()
        }

        fn ask(&self, request: &str) -> String {
            let mut stream = self.connect();
            stream.write_all(request.as_bytes()).unwrap();
            read(stream)
        }
    }

    fn read(mut stream: impl Read) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_scrape_gets_the_page() {
        let house = serving(|| PAGE.to_owned());
        for request in [
            "GET /metrics HTTP/1.0\r\n\r\n",
            "GET /metrics?x=y HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
        ] {
            let answer = house.ask(request);
            let (header, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(header.starts_with("HTTP/1.0 200 OK\r\n"), "{header}");
            assert!(header.contains("Content-Type: text/plain; version=0.0.4"));
            assert!(header.contains(&format!("Content-Length: {}", PAGE.len())));
            assert_eq!(body, PAGE);
        }
    }

    #[test]
    fn a_request_may_come_in_pieces() {
        let house = serving(|| PAGE.to_owned());
        let mut stream = house.connect();
        for byte in b"GET /metrics HTTP/1.0\r\n\r\n" {
            stream.write_all(&[*byte]).unwrap();
        }
        assert!(read(stream).ends_with(PAGE));
    }

    #[test]
    fn what_is_no_scrape_is_refused() {
        let house = serving(|| PAGE.to_owned());
        for (request, status) in [
            ("GET / HTTP/1.0\r\n\r\n", "404"),
            ("GET /metrics/../x HTTP/1.0\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.0\r\n\r\n", "405"),
            ("GET /metrics\r\n\r\n", "400"),
            ("\r\n\r\n", "400"),
            ("GET /metrics HTTP/2.0\r\n\r\n", "505"),
        ] {
            let answer = house.ask(request);
            assert!(
                answer.starts_with(&format!("HTTP/1.0 {status} ")),
                "{request:?}: {answer}"
            );
            assert!(!answer.contains(PAGE));
        }
    }

    #[test]
    fn a_request_without_end_is_cut() {
        let house = serving(|| PAGE.to_owned());
        let mut stream = house.connect();
        // It may have been refused before all of it was sent.
        let _ = stream.write_all(&vec![b'x'; LONGEST_REQUEST + 1024]);
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.0 400");
    }

    #[test]
    fn those_who_say_nothing_or_do_not_read_keep_nobody_out_for_long() {
        // More than a socket's buffers hold.
        let house = serving(|| "x".repeat(8 << 20));
        let mut idle: Vec<UnixStream> = (0..CONNECTIONS / 2).map(|_| house.connect()).collect();
        for _ in 0..CONNECTIONS {
            let mut stream = house.connect();
            stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
            idle.push(stream);
        }
        let start = Instant::now();
        let answer = house.ask("GET /metrics HTTP/1.0\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.0 200 OK"));
        assert!(start.elapsed() < PATIENCE * 3);
        drop(idle);
    }

    #[test]
    fn it_ends_at_once_whoever_is_connected() {
        let mut house = serving(|| PAGE.to_owned());
        let _idle = house.connect();
        let start = Instant::now();
        drop(house.server.take());
        assert!(start.elapsed() < PATIENCE);
    }

    #[test]
    fn a_port_of_the_loopback_interface_serves_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let free = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let port = Loopback::try_from(free.to_string()).unwrap();
        let _server = start(dir.path(), Some(port), || PAGE.to_owned()).unwrap();
        let mut stream = TcpStream::connect(free).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        assert!(read(stream).ends_with(PAGE));
    }
}
