//! The daemon's end of the store.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use log::{error, warn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::process::NAME;
use super::wire::{self, DONE, FORGET, FULL, KEEP, KEPT, Message, SYNC, TAKE};
use super::{SOCKET, listen};
use crate::command;
use crate::rate_limit::RateLimit;
use crate::text::chain;

/// A store that does not answer for so long is as good as dead. It waits for nothing.
const PATIENCE: Duration = Duration::from_secs(2);
/// Its first answer may take longer: systemd starts it.
const START: Duration = Duration::from_secs(15);

/// One that was not there is not tried again for so long: others wait meanwhile.
const PAUSE: Duration = Duration::from_secs(30);

/// For the thread that watches the store.
const STACK: usize = 128 * 1024;

/// Something is not kept over a restart of the daemon.
#[derive(Debug, thiserror::Error)]
pub enum FdStoreError {
    /// The unit is not there.
    #[error("nobody listens at {path}: systemctl start pcibackd-fdstore.socket")]
    Unit {
        /// Its socket.
        path: PathBuf,
    },
    /// No process could be started.
    #[error("the process {NAME} cannot be started")]
    Start(#[source] io::Error),
    /// It does not answer, or is another user's.
    #[error(
        "the process {NAME} does not answer as it should: end it (kill -9), and another one is started"
    )]
    Line(#[source] io::Error),
    /// It was not there a moment ago.
    #[error("the process {NAME} did not answer a moment ago, which the log tells of; it is tried again every {} s", PAUSE.as_secs())]
    Away,
    /// It may not open as many descriptors.
    #[error(
        "the process {NAME} may not have more descriptors open: raise LimitNOFILE= (systemctl edit pcibackd-fdstore), or ulimit -n"
    )]
    Full,
    /// Nor may this one.
    #[error(
        "pcibackd may not have more descriptors open: raise LimitNOFILE= (systemctl edit pcibackd), or ulimit -n"
    )]
    Own(#[source] io::Error),
}

/// Who starts the process if there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Starts {
    /// The daemon itself, from its own program.
    Daemon,
    /// Somebody else, who listens at the socket.
    Others,
}

impl Starts {
    /// As a daemon in a process of its own has it.
    pub fn of_daemon() -> Self {
        if command::is_service() {
            Self::Others
        } else {
            Self::Daemon
        }
    }
}

/// Descriptors that outlive the daemon, by name. Without a process that keeps them they are kept until the daemon ends.
#[derive(Debug)]
pub struct FdStore {
    socket: PathBuf,
    starts: Starts,
    state: Mutex<State>,
    /// Held by who waits for an answer.
    asking: Mutex<()>,
}

#[derive(Debug)]
struct State {
    line: Option<Arc<UnixStream>>,
    /// What an earlier daemon has left was taken.
    taken: bool,
    kept: BTreeMap<String, Vec<OwnedFd>>,
    child: Option<Child>,
    /// Until then it is not tried.
    away_until: Option<Instant>,
    /// The daemon ends.
    left: bool,
    /// How often a store that has died is replaced.
    revivals: RateLimit,
}

impl FdStore {
    /// Not connected yet: that is done when it is needed.
    pub fn new(run_dir: &Path, starts: Starts) -> Arc<Self> {
        Arc::new(Self {
            socket: run_dir.join(SOCKET),
            starts,
            state: Mutex::new(State {
                line: None,
                taken: false,
                kept: BTreeMap::new(),
                child: None,
                away_until: None,
                left: false,
                revivals: RateLimit::new(3, Duration::from_secs(10)),
            }),
            asking: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects, and takes what an earlier daemon has left.
    ///
    /// # Errors
    /// [`FdStoreError`].
    pub fn open(self: &Arc<Self>) -> Result<(), FdStoreError> {
        self.connected(&mut self.lock()).map(drop)
    }

    /// What is kept under a name. It stays there.
    pub fn get(self: &Arc<Self>, name: &str) -> Option<Vec<OwnedFd>> {
        let mut state = self.lock();
        // Without it there may still be what this daemon has kept.
        let _ = self.connected(&mut state);
        let fds = state.kept.get(name)?;
        copies(fds.iter().map(AsFd::as_fd))
            .inspect_err(|error| error!("{name} is made anew: {}", chain(error)))
            .ok()
    }

    /// Keeps descriptors under a name, instead of those that were.
    ///
    /// # Errors
    /// [`FdStoreError`]. They are kept until the daemon ends all the same.
    pub fn keep(self: &Arc<Self>, name: &str, fds: &[BorrowedFd<'_>]) -> Result<(), FdStoreError> {
        self.post(name, fds)?;
        self.sync()
    }

    /// As [`FdStore::keep`], but does not wait to hear that it is done: when the daemon is killed from now on they are kept, if the store has room.
    ///
    /// # Errors
    /// [`FdStoreError`] but [`FdStoreError::Full`].
    pub fn post(self: &Arc<Self>, name: &str, fds: &[BorrowedFd<'_>]) -> Result<(), FdStoreError> {
        let mut state = self.lock();
        let was_connected = state.line.is_some();
        let copies = copies(fds.iter().copied())?;
        state.kept.insert(name.to_owned(), copies);
        let line = self.connected(&mut state)?;
        if was_connected {
            let sent = wire::send(&line, KEEP, name, fds);
            sent.map_err(|error| state.give_up(error))?;
        }
        Ok(())
    }

    /// Closes all whose names begin so. The store does as soon as it can: see [`FdStore::sync`].
    pub fn forget(&self, prefix: &str) {
        let mut state = self.lock();
        state.kept.retain(|name, _| !name.starts_with(prefix));
        if let Some(line) = state.line.clone()
            && let Err(error) = wire::send(&line, FORGET, prefix, &[])
        {
            error!("{}", chain(&state.give_up(error)));
        }
    }

    /// Closes all but those whose names are wanted, and waits until that is done.
    pub fn retain(&self, mut is_wanted: impl FnMut(&str) -> bool) {
        let names: Vec<String> = self.lock().kept.keys().cloned().collect();
        let unwanted: Vec<_> = names.iter().filter(|name| !is_wanted(name)).collect();
        for name in &unwanted {
            self.forget(name);
        }
        if !unwanted.is_empty()
            && let Err(error) = self.sync()
        {
            error!("{}", chain(&error));
        }
    }

    /// Waits until the store has done all that it was told.
    ///
    /// # Errors
    /// [`FdStoreError::Line`]; [`FdStoreError::Full`]: something of it is not kept.
    pub fn sync(&self) -> Result<(), FdStoreError> {
        let _asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(line) = self.lock().line.clone() else {
            return Ok(());
        };
        let answer = || {
            wire::send(&line, SYNC, "", &[])?;
            let mut is_full = false;
            loop {
                match received(&line)?.kind {
                    DONE => return Ok(is_full),
                    kind => is_full |= kind == FULL,
                }
            }
        };
        match answer() {
            Ok(false) => Ok(()),
            Ok(true) => Err(FdStoreError::Full),
            Err(error) => Err(self.lock().give_up_line(&line, error)),
        }
    }

    /// Nothing is kept any more from now on, and what is stays for the next daemon, whoever of this one's threads is still at something.
    pub fn leave(&self) {
        self.lock().leave();
    }

    /// Connects, unless that is done.
    fn connected(self: &Arc<Self>, state: &mut State) -> Result<Arc<UnixStream>, FdStoreError> {
        if let Some(line) = &state.line {
            return Ok(Arc::clone(line));
        }
        let is_away = state.away_until.is_some_and(|until| Instant::now() < until);
        if is_away || state.left {
            return Err(FdStoreError::Away);
        }
        let line = self.connect(state);
        state.away_until = match &line {
            Ok(_) => None,
            Err(_) => Instant::now().checked_add(PAUSE),
        };
        line
    }

    fn connect(self: &Arc<Self>, state: &mut State) -> Result<Arc<UnixStream>, FdStoreError> {
        let line = Arc::new(self.reach(state)?);
        let exchange = || {
            line.set_read_timeout(Some(START))?;
            line.set_write_timeout(Some(PATIENCE))?;
            wire::send(&line, TAKE, "", &[])?;
            let mut found = Vec::new();
            loop {
                match received(&line)? {
                    Message { kind: DONE, .. } => {
                        line.set_read_timeout(Some(PATIENCE))?;
                        return Ok(found);
                    }
                    Message {
                        kind: KEPT,
                        name,
                        fds,
                    } => found.push((name, fds)),
                    Message { .. } => {}
                }
            }
        };
        let found = exchange().map_err(FdStoreError::Line)?;
        for (name, fds) in &state.kept {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            wire::send(&line, KEEP, name, &fds).map_err(FdStoreError::Line)?;
        }
        for (name, fds) in found {
            if state.kept.contains_key(&name) {
                continue;
            }
            if state.taken {
                // Forgotten while nobody was there to hear it.
                wire::send(&line, FORGET, &name, &[]).map_err(FdStoreError::Line)?;
            } else {
                state.kept.insert(name, fds);
            }
        }
        self.watch(&line).map_err(FdStoreError::Own)?;
        state.taken = true;
        state.line = Some(Arc::clone(&line));
        Ok(line)
    }

    /// A connection to a process that keeps descriptors, which is started if need be.
    fn reach(&self, state: &mut State) -> Result<UnixStream, FdStoreError> {
        let line = match reach(&self.socket) {
            Err(Errno::ENOENT | Errno::ECONNREFUSED) if self.starts == Starts::Daemon => {
                let child = start(&self.socket).map_err(FdStoreError::Start)?;
                state.child = Some(child);
                reach(&self.socket)
            }
            Err(Errno::ENOENT | Errno::ECONNREFUSED) => {
                let path = self.socket.clone();
                return Err(FdStoreError::Unit { path });
            }
            other => other,
        };
        let line = line.map_err(|error| FdStoreError::Line(error.into()))?;
        if wire::is_own(&line) {
            Ok(line)
        } else {
            let error = io::Error::other("it is another user's");
            Err(FdStoreError::Line(error))
        }
    }

    /// Has a thread wait for the store's end.
    fn watch(self: &Arc<Self>, line: &Arc<UnixStream>) -> io::Result<()> {
        let (store, line) = (Arc::downgrade(self), Arc::clone(line));
        let watch = move || {
            wait_for_end(&line);
            if let Some(store) = Weak::upgrade(&store) {
                store.revive(&line);
            }
        };
        thread::Builder::new()
            .name("fdstore".into())
            .stack_size(STACK)
            .spawn(watch)
            .map(drop)
    }

    /// There is to be another one in its place, which gets all that is kept.
    fn revive(self: &Arc<Self>, dead: &Arc<UnixStream>) {
        let mut state = self.lock();
        let is_replaced = state.line.as_ref();
        let is_replaced = is_replaced.is_some_and(|line| !Arc::ptr_eq(line, dead));
        if is_replaced || state.left {
            return;
        }
        state.line = None;
        state.away_until = None;
        if let Some(mut child) = state.child.take() {
            // It is dead, or does not answer. It is not to stay as a zombie.
            let _ = child.kill();
            let _ = child.wait();
        }
        if state.kept.is_empty() {
            return;
        }
        if !state.revivals.allow() {
            error!(
                "the process {NAME} dies again and again: until another one is needed, guests' taps and consoles do not outlive pcibackd"
            );
            return;
        }
        match self.connected(&mut state) {
            Ok(_) => {
                warn!("the process {NAME} had died; another one keeps guests' taps and consoles")
            }
            Err(error) => error!(
                "the process {NAME} has died; guests' taps and consoles do not outlive pcibackd: {}",
                chain(&error)
            ),
        }
    }
}

impl State {
    /// As [`State::give_up`], unless there is another one by now.
    fn give_up_line(&mut self, line: &Arc<UnixStream>, error: io::Error) -> FdStoreError {
        if self
            .line
            .as_ref()
            .is_some_and(|known| Arc::ptr_eq(known, line))
        {
            return self.give_up(error);
        }
        FdStoreError::Line(error)
    }

    fn leave(&mut self) {
        self.left = true;
        if let Some(line) = self.line.take() {
            let _ = line.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Nothing more is said to a store that does not answer.
    fn give_up(&mut self, error: io::Error) -> FdStoreError {
        if let Some(line) = self.line.take() {
            // Who watches it sees to another one.
            let _ = line.shutdown(std::net::Shutdown::Both);
        }
        FdStoreError::Line(error)
    }
}

impl Drop for FdStore {
    /// The store keeps all that there is for the next daemon.
    fn drop(&mut self) {
        self.leave();
    }
}

/// The next message; an error where there is no other end any more.
fn received(line: &UnixStream) -> io::Result<Message> {
    wire::receive(line)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn copies<'a>(fds: impl Iterator<Item = BorrowedFd<'a>>) -> Result<Vec<OwnedFd>, FdStoreError> {
    fds.map(|fd| fd.try_clone_to_owned())
        .collect::<io::Result<_>>()
        .map_err(FdStoreError::Own)
}

fn reach(path: &Path) -> nix::Result<UnixStream> {
    let line = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // One that accepts nobody has a queue, which may be full.
    let patience = TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
    setsockopt(&line, sockopt::SendTimeout, &patience)?;
    connect(line.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(line.into())
}

/// Starts a process that listens at this path.
fn start(path: &Path) -> io::Result<Child> {
    let listener = listen(path)?;
    Command::new("/proc/self/exe")
        .arg0(NAME)
        .stdin(listener)
        // It outlives whoever has started us, and waits for their end.
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
}

/// Returns when the other end is gone, or this one was shut down.
fn wait_for_end(line: &UnixStream) {
    loop {
        let mut fds = [PollFd::new(line.as_fd(), PollFlags::empty())];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            _ => return,
        }
    }
}
