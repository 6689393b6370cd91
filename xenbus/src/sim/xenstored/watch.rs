//! Watches: whom a change concerns, and how it is told.

use nix::errno::Errno;

use super::core::ConnectionId;
use super::path;
use super::tree::{Change, Need, allows};
use crate::types::DomId;
use crate::xenstore::wire::{self, MessageType};

/// A watch. Two are the same if all of their fields are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Watch {
    pub connection: ConnectionId,
    /// Absolute, or special.
    pub path: String,
    token: Vec<u8>,
    /// What the client left away and does not expect in events: its own directory and the `/` behind it.
    prefix: String,
}

impl Watch {
    /// Reads WATCH's or UNWATCH's payload.
    ///
    /// # Errors
    /// EINVAL.
    pub fn parse(payload: &[u8], connection: ConnectionId, domain: DomId) -> Result<Self, Errno> {
        let mut fields = payload.splitn(3, |byte| *byte == 0);
        let (Some(raw), Some(token), Some([])) = (fields.next(), fields.next(), fields.next())
        else {
            return Err(Errno::EINVAL);
        };
        let path = path::canonical(raw, domain)?;
        let relative = !raw.starts_with(b"/") && !path::is_special(&path);
        let prefix = if relative {
            format!("{}/", path::home(domain))
        } else {
            String::new()
        };
        Ok(Self {
            connection,
            path,
            token: token.to_vec(),
            prefix,
        })
    }

    /// Whether a client of `domain` is to be told of a change.
    pub fn concerns(&self, change: &Change, domain: DomId) -> bool {
        let covered = if change.exact {
            self.path == change.path
        } else {
            path::is_at_or_below(&change.path, &self.path)
        };
        covered
            && (allows(&change.perms, domain, Need::Read)
                || allows(&change.parent_perms, domain, Need::Read))
    }

    /// The event's message, for a change of `path`. `None` if it would be too long for one.
    pub fn event(&self, path: &str) -> Option<Vec<u8>> {
        let path = path.strip_prefix(self.prefix.as_str()).unwrap_or(path);
        wire::encode(
            MessageType::WatchEvent,
            0,
            0,
            &[path.as_bytes(), b"\0", &self.token, b"\0"],
        )
        .ok()
    }
}
