//! Several requests as one.

use super::connection::Connection;
use super::error::Error;
use super::store::Store;
use super::wire::{self, MessageType};

/// A transaction under way: reads see its own changes, nobody else does. See
/// [`super::Client::transaction`].
#[derive(Debug)]
pub struct Transaction<'a> {
    connection: &'a mut Connection,
    id: u32,
}

impl<'a> Transaction<'a> {
    pub(super) fn start(connection: &'a mut Connection) -> Result<Self, Error> {
        let reply = connection.exchange(MessageType::TransactionStart, 0, "", &[])?;
        let text = wire::strings(&reply).next().unwrap_or_default();
        let id = std::str::from_utf8(text)
            .ok()
            .and_then(|text| text.parse().ok());
        match id {
            Some(id) if id != 0 => Ok(Self { connection, id }),
            _ => Err(connection.protocol(format!(
                "'{}' as a transaction's number",
                text.escape_ascii()
            ))),
        }
    }

    pub(super) fn end(self, commit: bool) -> Result<(), Error> {
        let flag = if commit { "T" } else { "F" };
        self.connection
            .exchange(MessageType::TransactionEnd, self.id, flag, &[])
            .map(drop)
    }
}

impl Store for Transaction<'_> {
    fn request(&mut self, kind: MessageType, path: &str, rest: &[&[u8]]) -> Result<Vec<u8>, Error> {
        self.connection.request(kind, self.id, path, rest)
    }
}
