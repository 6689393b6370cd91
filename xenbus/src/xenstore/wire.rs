//! xenstore's messages (Xen `io/xs_wire.h`), the same over the socket and over `/dev/xen/xenbus`.
//!
//! A message is a [`Header`] of 16 bytes and up to [`PAYLOAD_MAX`] bytes of payload. Both ends use
//! this module: our client, and the embedded xenstored. All of it takes bytes and gives values;
//! what a peer claims about lengths is checked before anything is allocated.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The longest payload that may be sent (`XENSTORE_PAYLOAD_MAX`).
pub const PAYLOAD_MAX: usize = 4096;
/// The longest absolute path (`XENSTORE_ABS_PATH_MAX`).
pub const ABSOLUTE_PATH_MAX: usize = 3072;
/// The longest path relative to a domain's own directory (`XENSTORE_REL_PATH_MAX`).
pub const RELATIVE_PATH_MAX: usize = 2048;
/// Bytes of a [`Header`].
pub const HEADER_SIZE: usize = size_of::<Header>();

/// What stands before each payload (`struct xsd_sockmsg`). In the machine's byte order: both ends
/// are on one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// A [`MessageType`]'s number.
    pub kind: u32,
    /// Chosen by the requester, echoed in the reply. 0 in watch events.
    pub req_id: u32,
    /// The transaction that the request belongs to; 0 for none.
    pub tx_id: u32,
    /// Bytes of payload that follow.
    pub len: u32,
}

const _: () = {
    assert!(size_of::<Header>() == 16);
    assert!(std::mem::offset_of!(Header, kind) == 0);
    assert!(std::mem::offset_of!(Header, req_id) == 4);
    assert!(std::mem::offset_of!(Header, tx_id) == 8);
    assert!(std::mem::offset_of!(Header, len) == 12);
};

macro_rules! message_types {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// What a message is (`enum xsd_sockmsg_type`). A reply carries its request's type, or
        /// [`MessageType::Error`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum MessageType {
            $($(#[$doc])* $name = $number,)*
        }

        impl MessageType {
            /// The type of that number, if there is one.
            pub fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The type's name as xenstore's own documentation spells it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

message_types! {
    /// Administration of xenstored itself.
    Control = 0, "CONTROL";
    /// `path|` -> the names of the node's children, each ended by NUL.
    Directory = 1, "DIRECTORY";
    /// `path|` -> the node's value.
    Read = 2, "READ";
    /// `path|` -> permissions, each ended by NUL.
    GetPerms = 3, "GET_PERMS";
    /// `path|token|`
    Watch = 4, "WATCH";
    /// `path|token|`
    Unwatch = 5, "UNWATCH";
    /// `|` -> the transaction's number in decimal, ended by NUL.
    TransactionStart = 6, "TRANSACTION_START";
    /// `T|` to commit, `F|` to abort.
    TransactionEnd = 7, "TRANSACTION_END";
    /// `domid|gfn|port|`
    Introduce = 8, "INTRODUCE";
    /// `domid|`
    Release = 9, "RELEASE";
    /// `domid|` -> `/local/domain/domid|`
    GetDomainPath = 10, "GET_DOMAIN_PATH";
    /// `path|value`
    Write = 11, "WRITE";
    /// `path|`
    Mkdir = 12, "MKDIR";
    /// `path|`
    Rm = 13, "RM";
    /// `path|permission|...`
    SetPerms = 14, "SET_PERMS";
    /// From xenstored: `path|token|`
    WatchEvent = 15, "WATCH_EVENT";
    /// From xenstored: an errno's name, ended by NUL.
    Error = 16, "ERROR";
    /// `domid|` -> `T|` or `F|`
    IsDomainIntroduced = 17, "IS_DOMAIN_INTRODUCED";
    /// `domid|`
    Resume = 18, "RESUME";
    /// `domid|target|`
    SetTarget = 19, "SET_TARGET";
    /// `|`: drops all watches and transactions of the connection.
    ResetWatches = 21, "RESET_WATCHES";
    /// `path|offset|` -> `generation|name|...`; an empty name ends the last part.
    DirectoryPart = 22, "DIRECTORY_PART";
}

/// A complete message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its header; `len` is the payload's length.
    pub header: Header,
    /// Its payload, at most [`PAYLOAD_MAX`] bytes.
    pub payload: Vec<u8>,
}

impl Message {
    /// The message's type, if it is a known one.
    pub fn kind(&self) -> Option<MessageType> {
        MessageType::from_number(self.header.kind)
    }
}

/// What cannot be a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A payload is longer than the protocol allows.
    #[error("a payload of {len} bytes is longer than the {PAYLOAD_MAX} that xenstore allows")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
}

/// Puts a message together from parts of its payload.
///
/// # Errors
/// [`WireError::TooLong`].
pub fn encode(
    kind: MessageType,
    req_id: u32,
    tx_id: u32,
    parts: &[&[u8]],
) -> Result<Vec<u8>, WireError> {
    let len = parts
        .iter()
        .fold(0usize, |sum, part| sum.saturating_add(part.len()));
    let too_long = WireError::TooLong { len };
    if len > PAYLOAD_MAX {
        return Err(too_long);
    }
    let header = Header {
        kind: kind as u32,
        req_id,
        tx_id,
        len: u32::try_from(len).map_err(|_| too_long)?,
    };
    let mut bytes = Vec::with_capacity(HEADER_SIZE.saturating_add(len));
    bytes.extend_from_slice(header.as_bytes());
    for part in parts {
        bytes.extend_from_slice(part);
    }
    Ok(bytes)
}

/// Cuts a stream of bytes into messages. Holds what was fed and not yet taken; a caller that takes
/// all messages after each feed so has at most one incomplete message in here.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Adds bytes from the peer.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes fed and not yet taken.
    pub(crate) fn held(&self) -> usize {
        self.buffer.len()
    }

    /// Takes the next complete message; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`WireError::TooLong`] for a header that announces too much. The stream is beyond use then.
    pub fn next_message(&mut self) -> Result<Option<Message>, WireError> {
        let Ok((header, rest)) = Header::read_from_prefix(&self.buffer) else {
            return Ok(None);
        };
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        if len > PAYLOAD_MAX {
            return Err(WireError::TooLong { len });
        }
        let Some(payload) = rest.get(..len) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.buffer.drain(..HEADER_SIZE.saturating_add(len));
        Ok(Some(Message { header, payload }))
    }
}

/// The NUL-ended strings of a payload. A last one without its NUL counts too: xenstored leaves it
/// away at times.
pub fn strings(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    let ended = payload.strip_suffix(b"\0").unwrap_or(payload);
    let empty = payload.is_empty();
    ended.split(|byte| *byte == 0).filter(move |_| !empty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_a_header_and_its_payload() {
        let bytes = encode(MessageType::Write, 0x0102_0304, 5, &[b"/a\0", b"value"]).unwrap();
        assert_eq!(
            bytes[..16],
            [11, 0, 0, 0, 4, 3, 2, 1, 5, 0, 0, 0, 8, 0, 0, 0]
        );
        assert_eq!(&bytes[16..], b"/a\0value");
    }

    #[test]
    fn a_payload_may_be_4096_bytes_and_no_more() {
        let longest = encode(MessageType::Write, 1, 0, &[&[0; 4000], &[0; 96]]).unwrap();
        let mut decoder = Decoder::default();
        decoder.feed(&longest);
        assert_eq!(decoder.next_message().unwrap().unwrap().payload.len(), 4096);
        let error = encode(MessageType::Write, 1, 0, &[&[0; 4097]]).unwrap_err();
        assert_eq!(error, WireError::TooLong { len: 4097 });
        let header = Header {
            kind: 2,
            req_id: 1,
            tx_id: 0,
            len: 4097,
        };
        decoder.feed(header.as_bytes());
        assert_eq!(decoder.next_message(), Err(error));
    }

    #[test]
    fn messages_that_arrive_together_are_taken_one_by_one() {
        let mut decoder = Decoder::default();
        for number in 1..=3 {
            decoder.feed(&encode(MessageType::Read, number, 0, &[b"x"]).unwrap());
        }
        for number in 1..=3 {
            assert_eq!(
                decoder.next_message().unwrap().unwrap().header.req_id,
                number
            );
        }
        assert_eq!((decoder.next_message().unwrap(), decoder.held()), (None, 0));
    }

    #[test]
    fn strings_end_with_nul_or_with_the_payload() {
        let list = |payload| strings(payload).collect::<Vec<_>>();
        assert_eq!(list(b"a\0bc\0"), [&b"a"[..], b"bc"]);
        assert_eq!(list(b"a\0bc"), [&b"a"[..], b"bc"]);
        assert_eq!(list(b"\0"), [b""]);
        assert!(list(b"").is_empty());
    }

    #[test]
    fn each_type_has_its_number() {
        for number in 0..30 {
            let kind = MessageType::from_number(number);
            assert!(kind.is_none_or(|kind| kind as u32 == number));
        }
        assert_eq!(MessageType::from_number(15), Some(MessageType::WatchEvent));
        assert_eq!(MessageType::from_number(0xffff), None);
    }
}
