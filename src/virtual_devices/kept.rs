//! What of a guest's devices is kept open while no daemon runs, so that nobody at its other end notices a restart: the queues of
//! taps, pseudo-terminals, sockets and who is connected to them. Names are those of the guest's record, the device's place, and the
//! part that it has in the device: `7-UUID/s1f/tap`, `7-UUID/s1e/0/terminal`.
//!
//! What is made anew is kept before the guest can see any effect of it. All of a guest's is given up when it is gone
//! ([`super::VirtualGuests`]), or when it gets no devices.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::{error, warn};
use virtio::console::{Endpoint, Keeper};
use virtio::net::Link;
use xenbus::DomId;

use super::backends::is_socket;
use super::place::At;
use crate::fdstore::{FdStore, FdStoreError};
use crate::text::chain;

/// The queues of a card's tap.
const TAP: &str = "tap";

// No name is the beginning of another one: what begins so is forgotten together.

fn terminal(port: usize) -> String {
    format!("{port}/terminal")
}

fn socket(port: usize) -> String {
    format!("{port}/socket")
}

/// The name of all that a guest has begins so.
fn of_guest(record: &Path) -> String {
    let name = record.file_name().unwrap_or_default();
    format!("{}/", name.display())
}

/// A guest has no devices.
pub(super) fn forget_guest(fds: &FdStore, record: &Path) {
    fds.forget(&of_guest(record));
    if let Err(error) = fds.sync() {
        error!("{}", chain(&error));
    }
}

/// What of one device is kept.
#[derive(Debug, Clone)]
pub(super) struct KeptFds {
    store: Arc<FdStore>,
    domain: DomId,
    guest: String,
    at: At,
}

impl KeptFds {
    /// Of the device in a place of the guest whose files are in `record`.
    pub fn new(store: &Arc<FdStore>, domain: DomId, record: &Path, at: At) -> Self {
        Self {
            store: Arc::clone(store),
            domain,
            guest: of_guest(record),
            at,
        }
    }

    /// The device's place, as names have it.
    pub fn place(&self) -> String {
        self.at.tag()
    }

    fn name(&self, part: &str) -> String {
        format!("{}{}/{part}", self.guest, self.place())
    }

    fn get(&self, part: &str) -> Option<Vec<OwnedFd>> {
        self.store.get(&self.name(part))
    }

    fn get_one(&self, part: &str) -> Option<OwnedFd> {
        self.get(part)?.into_iter().next()
    }

    /// It can be had without being kept, so a failure is told and nothing more.
    fn keep(&self, part: &str, fds: &[BorrowedFd<'_>]) {
        if let Err(error) = self.store.keep(&self.name(part), fds) {
            self.complain(part, &error);
        }
    }

    fn complain(&self, part: &str, error: &FdStoreError) {
        warn!(
            "domain {}: the {part} of the device in {} does not outlive pcibackd: {}",
            self.domain,
            self.at,
            chain(error),
            part = part.trim_start_matches(|letter: char| letter.is_ascii_digit() || letter == '/'),
        );
    }

    fn forget(&self, part: &str) {
        self.store.forget(&self.name(part));
    }

    /// The queues of a card's tap, all of them.
    pub fn links(&self, queues: u16) -> Option<Vec<Link>> {
        let fds = self.get(TAP)?;
        let is_whole = fds.len() == usize::from(queues);
        let links: Result<Vec<_>, _> = fds.into_iter().map(Link::of_tap).collect();
        match links {
            Ok(links) if is_whole && links.iter().all(Link::is_of_tap) => Some(links),
            // Somebody has taken the tap away.
            _ => {
                self.forget(TAP);
                None
            }
        }
    }

    /// Keeps them.
    pub fn keep_links(&self, links: &[Link]) {
        let fds: Vec<_> = links.iter().map(AsFd::as_fd).collect();
        self.keep(TAP, &fds);
    }

    /// The pseudo-terminal of a console's port.
    pub fn terminal(&self, port: usize) -> Option<(Endpoint, PathBuf)> {
        Endpoint::of_pty(self.get_one(&terminal(port))?).ok()
    }

    /// Keeps it.
    pub fn keep_terminal(
        &self,
        port: usize,
        (endpoint, path): (Endpoint, PathBuf),
    ) -> (Endpoint, PathBuf) {
        self.keep(&terminal(port), &[endpoint.as_fd()]);
        (endpoint, path)
    }

    /// The socket of a console's port at this path, and who is connected to it.
    pub fn socket(&self, port: usize, path: &Path) -> Option<Endpoint> {
        let connections = self.connections(port);
        let listener = self.get_one(&socket(port))?;
        if !is_socket(path) {
            // Somebody has removed it, so nobody can come.
            self.forget(&socket(port));
            connections.forget();
            return None;
        }
        let connected = self.get_one(&connections.part);
        let endpoint = Endpoint::of_listener(listener, connected).ok()?;
        Some(endpoint.with_keeper(Box::new(connections)))
    }

    /// Keeps it, and who comes.
    pub fn keep_socket(&self, port: usize, endpoint: Endpoint) -> Endpoint {
        self.keep(&socket(port), &[endpoint.as_fd()]);
        endpoint.with_keeper(Box::new(self.connections(port)))
    }

    fn connections(&self, port: usize) -> Connections {
        Connections {
            kept: self.clone(),
            part: format!("{port}/connection"),
        }
    }
}

/// Keeps who is connected to a port.
#[derive(Debug)]
struct Connections {
    kept: KeptFds,
    part: String,
}

impl Keeper for Connections {
    fn keep(&self, connection: BorrowedFd<'_>) {
        let name = self.kept.name(&self.part);
        if let Err(error) = self.kept.store.post(&name, &[connection]) {
            self.kept.complain(&self.part, &error);
        }
    }

    fn forget(&self) {
        self.kept.forget(&self.part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Slot;
    use crate::fdstore::Starts;

    #[test]
    fn a_guest_of_the_same_number_gets_nothing_of_the_one_before_and_no_port_another_s() {
        let directory = tempfile::tempdir().unwrap();
        let store = FdStore::new(directory.path(), Starts::Others);
        let at = At::Pci(Slot::new(0x1f).unwrap());
        let of = |record: &str| KeptFds::new(&store, DomId(7), Path::new(record), at);
        for port in [1, 10] {
            of("/run/virtual/7-aa").keep_terminal(port, Endpoint::pty().unwrap());
        }
        let has = |record, port| of(record).terminal(port).is_some();
        assert!(has("/run/virtual/7-aa", 1) && has("/run/virtual/7-aa", 10));
        assert!(!has("/run/virtual/7-a", 1) && !has("/run/virtual/7-bb", 1));
        of("/run/virtual/7-aa").forget(&terminal(1));
        assert!(!has("/run/virtual/7-aa", 1) && has("/run/virtual/7-aa", 10));
        forget_guest(&store, Path::new("/run/virtual/7-a"));
        assert!(has("/run/virtual/7-aa", 10));
        forget_guest(&store, Path::new("/run/virtual/7-aa"));
        assert!(!has("/run/virtual/7-aa", 10));
    }
}
