//! Changing a device's state as xenbus drivers do.

use super::client::Client;
use super::error::Error;
use super::store::Store;
use crate::state::XenbusState;

/// What [`Client::switch_state`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switched {
    /// Wrote the state.
    Written,
    /// Nothing: the node holds this state already.
    Already,
    /// Nothing: there is no such node any more.
    Vanished,
    /// Nothing: somebody else has written another state since.
    Overtaken,
}

impl Client {
    /// Changes a device's `state` node from `current`, the state that the caller decided upon, to
    /// `target`. Nothing is written when the node has vanished (a removed device must not come
    /// back), when it holds `target` already, or when it holds neither: the toolstack writes it too,
    /// and what it asked for must not be lost.
    ///
    /// # Errors
    /// Those of a transaction.
    pub fn switch_state(
        &mut self,
        directory: &str,
        current: XenbusState,
        target: XenbusState,
    ) -> Result<Switched, Error> {
        let path = format!("{directory}/state");
        self.transaction(|transaction| {
            let stored = match transaction.read(&path) {
                Ok(value) => XenbusState::parse(&value),
                Err(Error::NotFound(_)) => return Ok(Switched::Vanished),
                Err(error) => return Err(error),
            };
            if stored == target {
                return Ok(Switched::Already);
            }
            if stored != current {
                return Ok(Switched::Overtaken);
            }
            transaction.write(&path, target.number().to_string())?;
            Ok(Switched::Written)
        })
    }
}
