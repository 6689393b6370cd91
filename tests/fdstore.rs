//! What becomes of descriptors when the daemon or the process that keeps them is killed: real processes, real signals.
//!
//! Not run by the usual harness: this program is also the daemon that gets killed and the process that outlives it.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod in_turn;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, ErrorKind, PipeReader, Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, process, thread};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr};
use nix::sys::socket::{accept, connect, recv, send, socket};
use nix::unistd::{Pid, close, geteuid};
use pcibackd::fdstore::{FdStore, FdStoreError, SOCKET, Starts, listen, run_if_store};
use tempfile::TempDir;
use virtio::console::Endpoint;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(20);
const DAEMON: &str = "fdstore-test-daemon";
const STRANGER: &str = "fdstore-test-stranger";
const STORE: &str = "pcibackd-fdstore";

fn main() -> ExitCode {
    if let Some(code) = run_if_store() {
        return code;
    }
    let mut arguments = env::args();
    let name = arguments.next().unwrap_or_default();
    if name == DAEMON {
        daemon(Path::new(&arguments.next().unwrap()));
    } else if name == STRANGER {
        return stranger(Path::new(&arguments.next().unwrap()));
    }
    in_turn::play(in_turn::tests![
        what_a_killed_daemon_had_open_stays_open_and_the_next_one_goes_on_with_it,
        a_store_that_died_is_replaced_and_has_everything_again,
        a_store_that_does_not_answer_holds_nobody_up_for_long_and_is_replaced,
        who_leaves_the_store_does_not_end_it_nor_come_back,
        a_store_that_hangs_up_is_not_called_again_and_again,
        a_store_outlives_every_signal_but_sigkill,
        a_store_that_keeps_nothing_ends_with_its_daemon,
        what_is_forgotten_is_closed_when_that_is_waited_for,
        a_store_without_room_says_so_and_keeps_what_it_has,
        a_store_that_can_open_nothing_for_a_while_keeps_what_it_has,
        another_user_gets_nothing,
    ])
}

fn store(run_dir: &Path) -> Arc<FdStore> {
    FdStore::new(run_dir, Starts::Daemon)
}

#[track_caller]
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LONG, "in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The stores that keep something for this run directory, zombies aside.
fn stores(run_dir: &Path) -> Vec<Pid> {
    let socket = run_dir.join(SOCKET);
    // Of the socket by its path; of a process's descriptors by their numbers.
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let of_path = |line: &&str| line.ends_with(socket.to_str().unwrap());
    let inodes: Vec<_> = sockets
        .lines()
        .filter(of_path)
        .filter_map(|line| line.split_whitespace().nth(6))
        .map(|inode| PathBuf::from(format!("socket:[{inode}]")))
        .collect();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let path = entry.path();
        let command = fs::read(path.join("cmdline")).unwrap_or_default();
        let listens = || {
            let listener = fs::read_link(path.join("fd/0")).unwrap_or_default();
            inodes.contains(&listener)
        };
        if command.starts_with(STORE.as_bytes()) && listens() {
            let number = entry.file_name().to_str().unwrap().parse().unwrap();
            found.push(Pid::from_raw(number));
        }
    }
    found
}

fn the_store(run_dir: &Path) -> Pid {
    match stores(run_dir)[..] {
        [pid] => pid,
        ref other => panic!("{other:?}"),
    }
}

/// What has the other end of a pipe of which a store has the end for writing.
struct Kept {
    end: PipeReader,
}

impl Kept {
    fn by(store: &Arc<FdStore>, name: &str) -> Self {
        let (end, theirs) = pipe().unwrap();
        store.keep(name, &[theirs.as_fd()]).unwrap();
        fcntl(&end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        Self { end }
    }

    /// Somebody still has the other end.
    fn is_open(&mut self) -> bool {
        match self.end.read(&mut [0]) {
            Ok(0) => false,
            Err(error) if error.kind() == ErrorKind::WouldBlock => true,
            other => panic!("{other:?}"),
        }
    }
}

fn is_hung_up(file: &File) -> bool {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).unwrap();
    fds[0].any().unwrap()
}

/// Opens what a console has, keeps it, says where it is, and waits to be killed. With few descriptors, if so many are given.
fn daemon(run_dir: &Path) -> ! {
    if let Some(limit) = env::args().nth(2) {
        let limit = limit.parse().unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, limit, limit).unwrap();
        let store = store(run_dir);
        store.open().unwrap();
        limited(&store);
    }
    let store = store(run_dir);
    let (endpoint, path) = Endpoint::pty().unwrap();
    store.keep("7-a/s1f/pty", &[endpoint.as_fd()]).unwrap();
    let listener = UnixListener::bind(run_dir.join("console")).unwrap();
    store.keep("7-a/s1f/socket", &[listener.as_fd()]).unwrap();
    println!("{}", path.display());
    let (connection, _) = listener.accept().unwrap();
    let several = [connection.as_fd(), listener.as_fd()];
    store.post("7-a/s1f/connection", &several).unwrap();
    println!("accepted");
    loop {
        thread::park();
    }
}

/// Keeps more than there is room for.
fn limited(store: &Arc<FdStore>) -> ! {
    let (_end, theirs) = pipe().unwrap();
    let many = [theirs.as_fd(); 20];
    store.keep("few", &many[..1]).unwrap();
    let mut count = 0;
    while store.keep(&format!("many{count}"), &many).is_ok() {
        count += 1;
        store.forget("nothing");
        assert!(count < 100);
    }
    let refused = store.keep("more", &many).unwrap_err();
    assert!(matches!(refused, FdStoreError::Full), "{refused}");
    store.keep("one", &many[..1]).unwrap();
    println!("full");
    loop {
        thread::park();
    }
}

struct Daemon {
    process: Child,
    says: BufReader<process::ChildStdout>,
}

impl Daemon {
    fn start(run_dir: &Path, arguments: &[&str]) -> Self {
        let mut process = Command::new("/proc/self/exe")
            .arg0(DAEMON)
            .arg(run_dir)
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let says = BufReader::new(process.stdout.take().unwrap());
        Self { process, says }
    }

    fn says(&mut self) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn what_a_killed_daemon_had_open_stays_open_and_the_next_one_goes_on_with_it() {
    let run_dir = TempDir::new().unwrap();
    let mut daemon = Daemon::start(run_dir.path(), &[]);
    let mut terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .open(daemon.says())
        .unwrap();
    let console = run_dir.path().join("console");
    let mut connection = UnixStream::connect(&console).unwrap();
    assert_eq!(daemon.says(), "accepted");
    daemon.kill();

    // While nobody is there nothing is lost.
    assert!(!is_hung_up(&terminal));
    terminal.write_all(b"by the terminal").unwrap();
    connection.write_all(b"by the connection").unwrap();
    let waiting = UnixStream::connect(&console).unwrap();

    let next = store(run_dir.path());
    let get = |name: &str| next.get(&format!("7-a/s1f/{name}")).unwrap();
    let heard = |fds: Vec<OwnedFd>| {
        let mut bytes = [0; 100];
        let len = File::from(fds.into_iter().next().unwrap())
            .read(&mut bytes)
            .unwrap();
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    };
    assert_eq!(heard(get("pty")), "by the terminal");
    assert_eq!(get("connection").len(), 2);
    assert_eq!(heard(get("connection")), "by the connection");
    let listener = UnixListener::from(get("socket").remove(0));
    listener.accept().unwrap();
    drop((waiting, listener));
    assert!(next.get("7-a/s1f/other").is_none());

    next.forget("7-a/");
    next.sync().unwrap();
    assert!(is_hung_up(&terminal));
    assert_eq!(connection.read(&mut [0]).unwrap(), 0);
}

fn a_store_that_died_is_replaced_and_has_everything_again() {
    let run_dir = TempDir::new().unwrap();
    let first = store(run_dir.path());
    let mut kept = Kept::by(&first, "7-a/tap");
    let dead = the_store(run_dir.path());
    kill(dead, Signal::SIGKILL).unwrap();
    until("there is another one", || {
        stores(run_dir.path()).iter().any(|pid| *pid != dead)
    });
    // It has it once it has been heard of again.
    until("it answers", || first.sync().is_ok());
    let alive = the_store(run_dir.path());
    assert!(alive != dead);
    drop(first);
    assert!(kept.is_open());
    let second = store(run_dir.path());
    assert!(second.get("7-a/tap").is_some());
    assert_eq!(the_store(run_dir.path()), alive);
    second.forget("");
    drop(second);
    until("all is closed", || !kept.is_open());
}

fn a_store_that_does_not_answer_holds_nobody_up_for_long_and_is_replaced() {
    let run_dir = TempDir::new().unwrap();
    let store = store(run_dir.path());
    let _kept = Kept::by(&store, "7-a/tap");
    let stuck = the_store(run_dir.path());
    kill(stuck, Signal::SIGSTOP).unwrap();
    let begun = Instant::now();
    let refused = store.sync().unwrap_err();
    assert!(matches!(refused, FdStoreError::Line(_)), "{refused}");
    assert!(begun.elapsed() < LONG / 2);
    until("there is another one", || {
        stores(run_dir.path()).iter().any(|pid| *pid != stuck)
    });
    until("it is the only one", || stores(run_dir.path()).len() == 1);
    store.forget("");
}

fn who_leaves_the_store_does_not_end_it_nor_come_back() {
    let run_dir = TempDir::new().unwrap();
    let first = store(run_dir.path());
    let mut kept = Kept::by(&first, "7-a/tap");
    let keeps = the_store(run_dir.path());
    first.leave();
    // Whoever is still at something is told, and nobody waits.
    let late = first.post("7-a/late", &[]).unwrap_err();
    assert!(matches!(late, FdStoreError::Away), "{late}");
    let second = store(run_dir.path());
    assert!(second.get("7-a/tap").is_some());
    assert!(kept.is_open());
    assert_eq!(the_store(run_dir.path()), keeps);
    drop(first);
    assert_eq!(second.get("7-a/tap").map(|fds| fds.len()), Some(1));
    second.forget("");
}

fn a_store_that_hangs_up_is_not_called_again_and_again() {
    let run_dir = TempDir::new().unwrap();
    let listener = listen(&run_dir.path().join(SOCKET)).unwrap();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    thread::spawn(move || {
        while let Ok(line) = accept(listener.as_raw_fd()) {
            counted.fetch_add(1, Ordering::SeqCst);
            close(line).unwrap();
        }
    });
    let store = FdStore::new(run_dir.path(), Starts::Others);
    let first = store.open().unwrap_err();
    assert!(matches!(first, FdStoreError::Line(_)), "{first}");
    for _ in 0..50 {
        assert!(matches!(store.open(), Err(FdStoreError::Away)));
    }
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

fn a_store_outlives_every_signal_but_sigkill() {
    let run_dir = TempDir::new().unwrap();
    let store = store(run_dir.path());
    let mut kept = Kept::by(&store, "7-a/tap");
    let pid = the_store(run_dir.path());
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGPIPE,
        Signal::SIGUSR1,
    ] {
        kill(pid, signal).unwrap();
    }
    store.sync().unwrap();
    assert!(kept.is_open());
    assert_eq!(the_store(run_dir.path()), pid);
    store.forget("");
}

fn a_store_that_keeps_nothing_ends_with_its_daemon() {
    let run_dir = TempDir::new().unwrap();
    let first = store(run_dir.path());
    let mut kept = Kept::by(&first, "7-a/tap");
    drop(first);
    thread::sleep(Duration::from_millis(50));
    the_store(run_dir.path());
    let second = store(run_dir.path());
    second.open().unwrap();
    second.retain(|name| !name.starts_with("7-a/"));
    assert!(!kept.is_open());
    drop(second);
    until("it has ended", || stores(run_dir.path()).is_empty());
    let third = store(run_dir.path());
    assert!(third.get("7-a/tap").is_none());
}

fn what_is_forgotten_is_closed_when_that_is_waited_for() {
    let run_dir = TempDir::new().unwrap();
    let store = store(run_dir.path());
    for round in 0..50 {
        let mut kept = ["7-a/tap", "7-a/pty", "71-a/tap"].map(|name| Kept::by(&store, name));
        store.forget("7-a/");
        store.sync().unwrap();
        let open: Vec<_> = kept.iter_mut().map(Kept::is_open).collect();
        assert_eq!(open, [false, false, true], "{round}");
    }
    store.forget("");
}

fn a_store_without_room_says_so_and_keeps_what_it_has() {
    let run_dir = TempDir::new().unwrap();
    let mut daemon = Daemon::start(run_dir.path(), &["340"]);
    assert_eq!(daemon.says(), "full");
    daemon.kill();
    let next = store(run_dir.path());
    for kept in ["few", "many0", "one"] {
        assert!(next.get(kept).is_some(), "{kept}");
    }
    assert!(next.get("more").is_none());
    next.forget("");
}

fn a_store_that_can_open_nothing_for_a_while_keeps_what_it_has() {
    let run_dir = TempDir::new().unwrap();
    let first = store(run_dir.path());
    let mut kept = Kept::by(&first, "7-a/tap");
    let pid = the_store(run_dir.path());
    let limit = |limit: &str| {
        let arguments = ["--pid", &pid.to_string(), limit];
        let status = Command::new("prlimit").args(arguments).status();
        assert!(status.unwrap().success());
    };
    drop(first);
    limit("--nofile=3:");
    // For the next one it may have a descriptor set aside already.
    let _ = store(run_dir.path()).open();
    thread::scope(|scope| {
        let opening = scope.spawn(|| store(run_dir.path()).open());
        thread::sleep(Duration::from_millis(300));
        assert!(!opening.is_finished());
        limit("--nofile=1000:");
        opening.join().unwrap().unwrap();
    });
    let second = store(run_dir.path());
    assert!(second.get("7-a/tap").is_some() && kept.is_open());
    second.forget("");
}

/// Asks for everything, as the daemon does.
fn stranger(path: &Path) -> ExitCode {
    let line = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::empty(),
        None,
    )
    .unwrap();
    connect(line.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    let _ = send(line.as_raw_fd(), b"t", MsgFlags::MSG_NOSIGNAL);
    match recv(line.as_raw_fd(), &mut [0; 100], MsgFlags::empty()) {
        Ok(0) | Err(nix::Error::ECONNRESET) => ExitCode::SUCCESS,
        other => {
            println!("it got {other:?}");
            ExitCode::FAILURE
        }
    }
}

fn another_user_gets_nothing() {
    if !geteuid().is_root() {
        println!("skipped: being another user takes root");
        return;
    }
    let run_dir = TempDir::new().unwrap();
    let first = store(run_dir.path());
    let _kept = Kept::by(&first, "7-a/tap");
    let path = run_dir.path().join(SOCKET);
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    // One daemon is served at a time.
    drop(first);
    fs::set_permissions(run_dir.path(), Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    let stranger = Command::new("/proc/self/exe")
        .arg0(STRANGER)
        .arg(&path)
        .uid(65534)
        .status()
        .unwrap();
    assert!(stranger.success());
    let second = store(run_dir.path());
    assert!(second.get("7-a/tap").is_some());
    second.forget("");
}
