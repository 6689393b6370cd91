//! What can be done with nodes, in a transaction or outside one.

use std::str::FromStr;

use super::error::{Error, Request};
use super::perms::Perm;
use super::wire::{MessageType, strings};
use crate::state::XenbusState;
use crate::types::{DomId, ParseNumberError, parse_decimal};

/// Nodes to read and write: [`super::Client`] outside a transaction, [`super::Transaction`] in one.
/// A function that takes `&mut impl Store` works in both.
///
/// Every method can give the connection's errors ([`Error::Gone`], [`Error::TimedOut`],
/// [`Error::Protocol`]) besides those named.
pub trait Store {
    /// Sends one request about a node and waits for its reply's payload. `rest` follows the path
    /// and its NUL.
    ///
    /// # Errors
    /// xenstored's.
    fn request(&mut self, kind: MessageType, path: &str, rest: &[&[u8]]) -> Result<Vec<u8>, Error>;

    /// Whether xenstored has been told of a domain, which the toolstack does when it has built it.
    ///
    /// # Errors
    /// The connection's.
    fn is_introduced(&mut self, domain: DomId) -> Result<bool, Error> {
        let answer = self.request(MessageType::IsDomainIntroduced, &domain.to_string(), &[])?;
        Ok(answer.first() == Some(&b'T'))
    }

    /// A node's value: any bytes, up to 4096.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Denied`].
    fn read(&mut self, path: &str) -> Result<Vec<u8>, Error> {
        self.request(MessageType::Read, path, &[])
    }

    /// A node's value as text. What is not UTF-8 is replaced by U+FFFD: it will not parse as
    /// anything.
    ///
    /// # Errors
    /// As [`Store::read`].
    fn read_string(&mut self, path: &str) -> Result<String, Error> {
        Ok(String::from_utf8_lossy(&self.read(path)?).into_owned())
    }

    /// A node's value as a number of ours (`DomId`, `Port`, ...): plain decimal digits and nothing
    /// else.
    ///
    /// # Errors
    /// As [`Store::read`], and [`Error::Malformed`].
    fn read_number<N: FromStr<Err = ParseNumberError>>(&mut self, path: &str) -> Result<N, Error>
    where
        Self: Sized,
    {
        self.read_string(path)?
            .parse()
            .map_err(|source| Error::Malformed {
                path: path.to_owned(),
                source,
            })
    }

    /// A node's value as an unsigned number: plain decimal digits and nothing else.
    ///
    /// # Errors
    /// As [`Store::read`], and [`Error::Malformed`].
    fn read_u32(&mut self, path: &str) -> Result<u32, Error> {
        let text = self.read_string(path)?;
        parse_decimal(&text, "number").map_err(|source| Error::Malformed {
            path: path.to_owned(),
            source,
        })
    }

    /// A `state` node's value; [`XenbusState::Unknown`] when there is none, or nothing that is a
    /// state.
    ///
    /// # Errors
    /// As [`Store::read`], without [`Error::NotFound`].
    fn read_state(&mut self, path: &str) -> Result<XenbusState, Error> {
        match self.read(path) {
            Ok(value) => Ok(XenbusState::parse(&value)),
            Err(Error::NotFound(_)) => Ok(XenbusState::Unknown),
            Err(error) => Err(error),
        }
    }

    /// Sets a node's value. Makes the node, and the ones above it, where they are missing.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NoSpace`], [`Error::TooBig`].
    fn write(&mut self, path: &str, value: impl AsRef<[u8]>) -> Result<(), Error>
    where
        Self: Sized,
    {
        self.request(MessageType::Write, path, &[value.as_ref()])
            .map(drop)
    }

    /// Makes a node without a value; no error if it exists.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NoSpace`].
    fn mkdir(&mut self, path: &str) -> Result<(), Error> {
        self.request(MessageType::Mkdir, path, &[]).map(drop)
    }

    /// Removes a node and all below it; no error if it is missing, as long as the one above exists.
    ///
    /// # Errors
    /// [`Error::Denied`]; [`Error::NotFound`] when the node above is missing too.
    fn rm(&mut self, path: &str) -> Result<(), Error> {
        self.request(MessageType::Rm, path, &[]).map(drop)
    }

    /// The names of a node's children, in xenstored's order. A list too long for one message is
    /// fetched in parts, and anew whenever it changes meanwhile.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Denied`]; [`Error::Again`] when the list keeps changing.
    fn directory(&mut self, path: &str) -> Result<Vec<String>, Error> {
        match self.request(MessageType::Directory, path, &[]) {
            Ok(payload) => Ok(names(&payload)),
            Err(Error::TooBig(_)) => directory_in_parts(self, path),
            Err(error) => Err(error),
        }
    }

    /// Whether there is such a node.
    ///
    /// # Errors
    /// As [`Store::read`], without [`Error::NotFound`].
    fn exists(&mut self, path: &str) -> Result<bool, Error> {
        match self.read(path) {
            Ok(_) => Ok(true),
            Err(Error::NotFound(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A node's permissions, the owner's entry first.
    ///
    /// # Errors
    /// As [`Store::read`]; [`Error::Refused`] for an entry that is none.
    fn get_perms(&mut self, path: &str) -> Result<Vec<Perm>, Error> {
        let payload = self.request(MessageType::GetPerms, path, &[])?;
        let entry = |text: &[u8]| {
            Perm::parse(text).ok_or_else(|| Error::Refused {
                request: Request {
                    kind: MessageType::GetPerms,
                    path: path.to_owned(),
                },
                code: format!("'{}'", text.escape_ascii()),
            })
        };
        strings(&payload).map(entry).collect()
    }

    /// Sets a node's permissions, the owner's entry first.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Denied`], [`Error::Invalid`].
    fn set_perms(&mut self, path: &str, perms: &[Perm]) -> Result<(), Error> {
        let entries: String = perms.iter().map(|perm| format!("{perm}\0")).collect();
        self.request(MessageType::SetPerms, path, &[entries.as_bytes()])
            .map(drop)
    }
}

fn names(payload: &[u8]) -> Vec<String> {
    strings(payload)
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect()
}

/// How often a list that changes while it is fetched is fetched anew.
const RESTARTS: usize = 64;

fn directory_in_parts<S: Store + ?Sized>(store: &mut S, path: &str) -> Result<Vec<String>, Error> {
    for _ in 0..RESTARTS {
        if let Some(list) = directory_pass(store, path)? {
            return Ok(names(&list));
        }
    }
    Err(Error::Again(Request {
        kind: MessageType::DirectoryPart,
        path: path.to_owned(),
    }))
}

/// The whole list, each name ended by NUL; `None` when it changed under way.
fn directory_pass<S: Store + ?Sized>(store: &mut S, path: &str) -> Result<Option<Vec<u8>>, Error> {
    let malformed = |what: &str| Error::Refused {
        request: Request {
            kind: MessageType::DirectoryPart,
            path: path.to_owned(),
        },
        code: what.to_owned(),
    };
    let mut list = Vec::new();
    let mut generation: Option<Vec<u8>> = None;
    loop {
        let offset = format!("{}\0", list.len());
        let payload = store.request(MessageType::DirectoryPart, path, &[offset.as_bytes()])?;
        let mut fields = payload.splitn(2, |byte| *byte == 0);
        let (Some(now), Some(part)) = (fields.next(), fields.next()) else {
            return Err(malformed("a part without a generation"));
        };
        if generation.as_deref().is_some_and(|before| before != now) {
            return Ok(None);
        }
        generation = Some(now.to_vec());
        // An empty name, so one more NUL, ends the list.
        let (part, last) = match part {
            [0] => (&[][..], true),
            [.., 0, 0] => (part.split_last().map_or(part, |(_, names)| names), true),
            [.., 0] => (part, false),
            _ => return Err(malformed("a part that ends within a name")),
        };
        list.extend_from_slice(part);
        if last {
            return Ok(Some(list));
        }
    }
}
