//! xenstored without its sockets: requests go in, replies and watch events come out.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use super::limits::Limits;
use super::path;
use super::transaction::Transaction;
use super::tree::{Change, Tree};
use super::view::View;
use super::watch::Watch;
use crate::types::DomId;
use crate::xenstore::Perm;
use crate::xenstore::wire::{self, Header, Message, MessageType, PAYLOAD_MAX};

/// Names a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ConnectionId(pub u64);

/// A client, as the core knows it.
#[derive(Debug)]
struct Connection {
    domain: DomId,
    transactions: BTreeMap<u32, Transaction>,
    watches: usize,
    /// Bytes for the client that nobody has sent yet.
    outbox: Vec<u8>,
}

/// Everything that xenstored knows.
#[derive(Debug)]
pub(super) struct Core {
    tree: Tree,
    limits: Limits,
    connections: BTreeMap<ConnectionId, Connection>,
    watches: Vec<Watch>,
    introduced: BTreeSet<DomId>,
    last_connection: u64,
    last_transaction: u32,
}

/// What a reply holds: the payload.
type Reply = Result<Vec<u8>, Errno>;

impl Core {
    pub fn new() -> Self {
        Self {
            tree: Tree::new(),
            limits: Limits::default(),
            connections: BTreeMap::new(),
            watches: Vec::new(),
            introduced: BTreeSet::new(),
            last_connection: 0,
            last_transaction: 0,
        }
    }

    /// Takes a new client in.
    pub fn connect(&mut self, domain: DomId) -> ConnectionId {
        self.last_connection = self.last_connection.saturating_add(1);
        let id = ConnectionId(self.last_connection);
        self.connections.insert(
            id,
            Connection {
                domain,
                transactions: BTreeMap::new(),
                watches: 0,
                outbox: Vec::new(),
            },
        );
        id
    }

    /// Forgets a client, its watches and its transactions.
    pub fn disconnect(&mut self, id: ConnectionId) {
        self.connections.remove(&id);
        self.watches.retain(|watch| watch.connection != id);
    }

    /// The connections of a domain.
    pub fn connections_of(&self, domain: DomId) -> Vec<ConnectionId> {
        self.connections
            .iter()
            .filter(|(_, connection)| connection.domain == domain)
            .map(|(id, _)| *id)
            .collect()
    }

    /// What is to be sent to a client. The sender takes away what it has sent.
    pub fn outbox(&mut self, id: ConnectionId) -> Option<&mut Vec<u8>> {
        self.connections
            .get_mut(&id)
            .map(|connection| &mut connection.outbox)
    }

    /// Every path with its value.
    pub fn values(&self) -> BTreeMap<String, Vec<u8>> {
        self.tree.values()
    }

    /// Takes note that an introduced domain is gone.
    pub fn forget(&mut self, domain: DomId) {
        self.introduced.remove(&domain);
    }

    /// A domain has shut down or is gone.
    pub fn domain_released(&mut self) {
        self.fire_special("@releaseDomain");
    }

    /// Carries one request out and leaves the reply in the outbox, behind the events that it caused. Only a watch's first event follows
    /// its reply.
    pub fn handle(&mut self, id: ConnectionId, message: &Message) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        let domain = connection.domain;
        let Some(kind) = message.kind() else {
            return self.reply(id, message.header, Err(Errno::ENOSYS));
        };
        let tx_id = message.header.tx_id;
        let payload = message.payload.as_slice();
        let outcome = match kind {
            MessageType::Directory
            | MessageType::DirectoryPart
            | MessageType::Read
            | MessageType::Write
            | MessageType::Mkdir
            | MessageType::Rm
            | MessageType::GetPerms
            | MessageType::SetPerms => self.on_node(id, domain, kind, tx_id, payload),
            MessageType::TransactionStart => self.start_transaction(id, domain, tx_id),
            MessageType::TransactionEnd => self.end_transaction(id, domain, tx_id, payload),
            MessageType::Watch => self.watch(id, domain, payload),
            MessageType::Unwatch => self.unwatch(id, domain, payload),
            MessageType::ResetWatches => self.reset(id),
            MessageType::GetDomainPath => {
                domain_id(payload).map(|domain| nul_ended(&path::home(domain)))
            }
            MessageType::IsDomainIntroduced => {
                let known = |domain| domain == DomId::DOM0 || self.introduced.contains(&domain);
                domain_id(payload).map(|domain| nul_ended(if known(domain) { "T" } else { "F" }))
            }
            MessageType::Introduce | MessageType::Release if domain != DomId::DOM0 => {
                Err(Errno::EACCES)
            }
            MessageType::Introduce => self.introduce(payload),
            MessageType::Release => self.release(payload),
            MessageType::Control
            | MessageType::WatchEvent
            | MessageType::Error
            | MessageType::Resume
            | MessageType::SetTarget => Err(Errno::ENOSYS),
        };
        let added = outcome.is_ok() && kind == MessageType::Watch;
        self.reply(id, message.header, outcome);
        if added {
            self.first_event(id);
        }
    }

    fn reply(&mut self, id: ConnectionId, request: Header, outcome: Reply) {
        let (kind, payload) = match outcome {
            Ok(payload) => (request.kind, payload),
            // The name of an errno is how the protocol spells it.
            Err(errno) => (MessageType::Error as u32, nul_ended(&format!("{errno:?}"))),
        };
        let len = u32::try_from(payload.len()).unwrap_or_default();
        if let Some(outbox) = self.outbox(id) {
            let header = Header {
                kind,
                req_id: request.req_id,
                tx_id: request.tx_id,
                len,
            };
            outbox.extend_from_slice(zerocopy::IntoBytes::as_bytes(&header));
            outbox.extend_from_slice(&payload);
        }
    }

    /// The requests about one node, which may be part of a transaction.
    fn on_node(
        &mut self,
        id: ConnectionId,
        domain: DomId,
        kind: MessageType,
        tx_id: u32,
        payload: &[u8],
    ) -> Reply {
        let (raw, rest) = split(payload, kind)?;
        let path = path::canonical(raw, domain)?;
        if path::is_special(&path) {
            return Err(Errno::EINVAL);
        }
        let connection = self.connections.get_mut(&id).ok_or(Errno::EIO)?;
        let transaction = match tx_id {
            0 => None,
            _ => Some(
                connection
                    .transactions
                    .get_mut(&tx_id)
                    .ok_or(Errno::ENOENT)?,
            ),
        };
        let mut view = View {
            tree: &mut self.tree,
            transaction,
            domain,
            limits: &self.limits,
            changes: Vec::new(),
        };
        let outcome = match kind {
            MessageType::Read => view.read(&path),
            MessageType::Directory => view
                .directory(&path)
                .and_then(|(_, names)| whole_list(&names)),
            MessageType::DirectoryPart => view
                .directory(&path)
                .and_then(|(generation, names)| part_of_list(generation, &names, rest)),
            MessageType::Write => view.write(&path, rest).map(acknowledge),
            MessageType::Mkdir => view.mkdir(&path).map(acknowledge),
            MessageType::Rm => view.rm(&path).map(acknowledge),
            MessageType::GetPerms => view.perms(&path).map(|perms| {
                perms
                    .iter()
                    .flat_map(|perm| nul_ended(&perm.to_string()))
                    .collect()
            }),
            MessageType::SetPerms => permissions(rest)
                .and_then(|perms| view.set_perms(&path, perms))
                .map(acknowledge),
            _ => Err(Errno::ENOSYS),
        };
        let View {
            mut changes,
            transaction,
            ..
        } = view;
        match transaction {
            Some(transaction) => transaction.changes.append(&mut changes),
            None => self.fire(&changes),
        }
        outcome
    }

    fn start_transaction(&mut self, id: ConnectionId, domain: DomId, tx_id: u32) -> Reply {
        let limit = self.limits.transactions;
        let connection = self.connections.get_mut(&id).ok_or(Errno::EIO)?;
        if tx_id != 0 {
            return Err(Errno::EBUSY);
        }
        if domain != DomId::DOM0 && connection.transactions.len() >= limit {
            return Err(Errno::ENOSPC);
        }
        loop {
            self.last_transaction = self.last_transaction.wrapping_add(1);
            let new = self.last_transaction;
            if new != 0 && !connection.transactions.contains_key(&new) {
                connection.transactions.insert(new, Transaction::default());
                return Ok(nul_ended(&new.to_string()));
            }
        }
    }

    fn end_transaction(
        &mut self,
        id: ConnectionId,
        domain: DomId,
        tx_id: u32,
        payload: &[u8],
    ) -> Reply {
        let commit = match payload {
            b"T\0" | b"T" => true,
            b"F\0" | b"F" => false,
            _ => return Err(Errno::EINVAL),
        };
        let connection = self.connections.get_mut(&id).ok_or(Errno::EIO)?;
        let transaction = connection
            .transactions
            .remove(&tx_id)
            .ok_or(Errno::ENOENT)?;
        if commit {
            let changes = transaction.commit(&mut self.tree, domain, &self.limits)?;
            self.fire(&changes);
        }
        Ok(acknowledge(()))
    }

    fn watch(&mut self, id: ConnectionId, domain: DomId, payload: &[u8]) -> Reply {
        let watch = Watch::parse(payload, id, domain)?;
        if self.watches.contains(&watch) {
            return Err(Errno::EEXIST);
        }
        let limit = self.limits.watches;
        let connection = self.connections.get_mut(&id).ok_or(Errno::EIO)?;
        if domain != DomId::DOM0 && connection.watches >= limit {
            return Err(Errno::E2BIG);
        }
        connection.watches = connection.watches.saturating_add(1);
        self.watches.push(watch);
        Ok(acknowledge(()))
    }

    /// A new watch fires at once, whatever the state of its node: clients rely on it.
    fn first_event(&mut self, id: ConnectionId) {
        if let Some(watch) = self.watches.last() {
            let event = watch.event(&watch.path);
            self.send_event(id, event.as_deref());
        }
    }

    fn unwatch(&mut self, id: ConnectionId, domain: DomId, payload: &[u8]) -> Reply {
        let watch = Watch::parse(payload, id, domain)?;
        let position = self
            .watches
            .iter()
            .position(|known| *known == watch)
            .ok_or(Errno::ENOENT)?;
        self.watches.remove(position);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.watches = connection.watches.saturating_sub(1);
        }
        Ok(acknowledge(()))
    }

    fn reset(&mut self, id: ConnectionId) -> Reply {
        self.watches.retain(|watch| watch.connection != id);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.watches = 0;
            connection.transactions.clear();
        }
        Ok(acknowledge(()))
    }

    fn introduce(&mut self, payload: &[u8]) -> Reply {
        if wire::strings(payload).count() < 3 {
            return Err(Errno::EINVAL);
        }
        if self.introduced.insert(domain_id(payload)?) {
            self.fire_special("@introduceDomain");
        }
        Ok(acknowledge(()))
    }

    fn release(&mut self, payload: &[u8]) -> Reply {
        if !self.introduced.remove(&domain_id(payload)?) {
            return Err(Errno::ENOENT);
        }
        self.fire_special("@releaseDomain");
        Ok(acknowledge(()))
    }

    fn fire(&mut self, changes: &[Change]) {
        for change in changes {
            let events: Vec<_> = self
                .watches
                .iter()
                .filter(|watch| {
                    let domain = self
                        .connections
                        .get(&watch.connection)
                        .map(|connection| connection.domain);
                    domain.is_some_and(|domain| watch.concerns(change, domain))
                })
                .map(|watch| (watch.connection, watch.event(&change.path)))
                .collect();
            for (id, event) in events {
                self.send_event(id, event.as_deref());
            }
        }
    }

    fn fire_special(&mut self, name: &str) {
        let events: Vec<_> = self
            .watches
            .iter()
            .filter(|w| w.path == name)
            .map(|w| (w.connection, w.event(name)))
            .collect();
        for (id, event) in events {
            // Xen's default: these two are dom0's only.
            if self
                .connections
                .get(&id)
                .is_some_and(|connection| connection.domain == DomId::DOM0)
            {
                self.send_event(id, event.as_deref());
            }
        }
    }

    fn send_event(&mut self, id: ConnectionId, event: Option<&[u8]>) {
        if let (Some(event), Some(outbox)) = (event, self.outbox(id)) {
            outbox.extend_from_slice(event);
        }
    }
}

fn acknowledge((): ()) -> Vec<u8> {
    nul_ended("OK")
}

fn nul_ended(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// Cuts a payload after its path. Only WRITE, SET_PERMS and DIRECTORY_PART have something there.
fn split(payload: &[u8], kind: MessageType) -> Result<(&[u8], &[u8]), Errno> {
    let mut parts = payload.splitn(2, |byte| *byte == 0);
    let (Some(path), Some(rest)) = (parts.next(), parts.next()) else {
        return Err(Errno::EINVAL);
    };
    let takes_more = matches!(
        kind,
        MessageType::Write | MessageType::SetPerms | MessageType::DirectoryPart
    );
    if takes_more || rest.is_empty() {
        Ok((path, rest))
    } else {
        Err(Errno::EINVAL)
    }
}

/// The domain id that stands first in a payload.
fn domain_id(payload: &[u8]) -> Result<DomId, Errno> {
    let text = wire::strings(payload).next().unwrap_or_default();
    let id: DomId = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or(Errno::EINVAL)?;
    if id < DomId::FIRST_RESERVED {
        Ok(id)
    } else {
        Err(Errno::EINVAL)
    }
}

fn permissions(payload: &[u8]) -> Result<Vec<Perm>, Errno> {
    let perms: Option<Vec<_>> = wire::strings(payload).map(Perm::parse).collect();
    perms.filter(|perms| !perms.is_empty()).ok_or(Errno::EINVAL)
}

fn joined(names: &[String]) -> Vec<u8> {
    names.iter().flat_map(|name| nul_ended(name)).collect()
}

fn whole_list(names: &[String]) -> Reply {
    let list = joined(names);
    if list.len() > PAYLOAD_MAX {
        Err(Errno::E2BIG)
    } else {
        Ok(list)
    }
}

/// The names from byte `offset` of the list on, as many whole ones as fit, behind the list's generation. An empty name ends the last part.
fn part_of_list(generation: u64, names: &[String], rest: &[u8]) -> Reply {
    let text = wire::strings(rest).next().unwrap_or_default();
    let offset: usize = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or(Errno::EINVAL)?;
    let list = joined(names);
    let mut reply = nul_ended(&generation.to_string());
    let left = list.get(offset..).unwrap_or_default();
    let space = PAYLOAD_MAX.saturating_sub(reply.len()).saturating_sub(1);
    if left.len() <= space {
        reply.extend_from_slice(left);
        reply.push(0);
    } else {
        let window = left.get(..space).unwrap_or_default();
        let end = window
            .iter()
            .rposition(|byte| *byte == 0)
            .map_or(0, |last| last.saturating_add(1));
        reply.extend_from_slice(window.get(..end).unwrap_or_default());
    }
    Ok(reply)
}

#[cfg(test)]
mod tests;
