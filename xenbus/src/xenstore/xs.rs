//! [`xenstore_rs::Xs`] on our client, for programs that are written against that trait.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use xenstore_rs::Xs;

use super::client::Client;
use super::error::Error;
use super::store::Store;

/// A [`Client`] behind [`Xs`], whose methods take `&self`. The trait knows text only, and neither
/// watches nor transactions: [`XsClient::into_inner`] gives the client back for those.
#[derive(Debug)]
pub struct XsClient(Mutex<Client>);

impl XsClient {
    /// Wraps a client.
    pub fn new(client: Client) -> Self {
        Self(Mutex::new(client))
    }

    /// The client.
    pub fn into_inner(self) -> Client {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn client(&self) -> MutexGuard<'_, Client> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Xs for XsClient {
    fn directory(&self, path: &str) -> io::Result<Vec<Box<str>>> {
        let names = self.client().directory(path).map_err(into_io)?;
        Ok(names.into_iter().map(String::into_boxed_str).collect())
    }

    fn read(&self, path: &str) -> io::Result<Box<str>> {
        let value = self.client().read(path).map_err(into_io)?;
        match String::from_utf8(value) {
            Ok(text) => Ok(text.into_boxed_str()),
            Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }

    fn write(&self, path: &str, data: &str) -> io::Result<()> {
        self.client().write(path, data).map_err(into_io)
    }

    fn rm(&self, path: &str) -> io::Result<()> {
        self.client().rm(path).map_err(into_io)
    }
}

fn into_io(error: Error) -> io::Error {
    let kind = match error {
        Error::NotFound(_) => io::ErrorKind::NotFound,
        Error::Denied(_) => io::ErrorKind::PermissionDenied,
        Error::Exists(_) => io::ErrorKind::AlreadyExists,
        Error::Invalid(_) | Error::TooBig(_) => io::ErrorKind::InvalidInput,
        Error::Again(_) => io::ErrorKind::WouldBlock,
        Error::NoSpace(_) => io::ErrorKind::StorageFull,
        Error::TimedOut { .. } => io::ErrorKind::TimedOut,
        Error::Gone { .. } => io::ErrorKind::BrokenPipe,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}
