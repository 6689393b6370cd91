//! What can go wrong with xenstore.

use std::fmt;
use std::io;
use std::time::Duration;

use super::wire::MessageType;
use crate::types::ParseNumberError;

/// The request that failed: for error messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What was asked for.
    pub kind: MessageType,
    /// The node that it was about. Empty for a transaction.
    pub path: String,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "xenstore {}", self.kind.name())?;
        if !self.path.is_empty() {
            write!(f, " {}", self.path)?;
        }
        Ok(())
    }
}

/// A failed request, or a failed connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// ENOENT.
    #[error("{0}: no such node")]
    NotFound(Request),
    /// EACCES, EPERM, EROFS.
    #[error("{0}: not allowed (see the node's permissions: xenstore-ls -p)")]
    Denied(Request),
    /// EAGAIN. From [`super::Client::transaction`]: still so after all retries.
    #[error("{0}: others keep changing the same nodes")]
    Again(Request),
    /// EEXIST: for a watch, the same path and token are watched already.
    #[error("{0}: exists already")]
    Exists(Request),
    /// EINVAL, or a path or token that cannot be sent at all.
    #[error("{0}: xenstore cannot have such a path, token or value")]
    Invalid(Request),
    /// ENOSPC: a quota of xenstored's.
    #[error("{0}: beyond a quota of xenstored's (nodes, watches or transactions per domain)")]
    NoSpace(Request),
    /// E2BIG, or a request that would be longer than a message may be.
    #[error("{0}: too long for one xenstore message")]
    TooBig(Request),
    /// Any other errno.
    #[error("{request}: xenstored says {code}")]
    Refused {
        /// What was asked.
        request: Request,
        /// The errno's name as xenstored sent it.
        code: String,
    },
    /// The node's value is not the number that it has to be.
    #[error("xenstore node {path}")]
    Malformed {
        /// The node.
        path: String,
        /// What is wrong with it.
        #[source]
        source: ParseNumberError,
    },
    /// There is no xenstored to talk to.
    #[error("no xenstored at {tried}: is this dom0, and does it run? (systemctl status xenstored)")]
    Unreachable {
        /// Where we looked.
        tried: String,
        /// The last failure.
        #[source]
        source: io::Error,
    },
    /// The connection ended under us.
    #[error(
        "xenstored has gone away ({peer}): no domain can be started, stopped or changed until it \
         is back; running guests keep their devices. xenstored cannot be restarted safely: \
         reboot the host when its guests allow it"
    )]
    Gone {
        /// The socket or device.
        peer: String,
        /// How it showed; `None` for an ordinary end of the stream.
        #[source]
        source: Option<io::Error>,
    },
    /// No reply in time. Whether the request was carried out is not known.
    #[error("{request}: no answer for {waited:?}: is xenstored stopped or overloaded?")]
    TimedOut {
        /// What was asked.
        request: Request,
        /// How long was waited.
        waited: Duration,
    },
    /// The peer does not speak xenstore. The connection is beyond use.
    #[error("{peer} does not speak the xenstore protocol: {what}")]
    Protocol {
        /// The socket or device.
        peer: String,
        /// What was received.
        what: String,
    },
}

impl Error {
    /// The error that an errno's name in an ERROR reply stands for.
    pub(super) fn from_code(request: Request, code: &[u8]) -> Self {
        match code {
            b"ENOENT" => Self::NotFound(request),
            b"EACCES" | b"EPERM" | b"EROFS" => Self::Denied(request),
            b"EAGAIN" => Self::Again(request),
            b"EEXIST" => Self::Exists(request),
            b"EINVAL" => Self::Invalid(request),
            b"ENOSPC" => Self::NoSpace(request),
            b"E2BIG" => Self::TooBig(request),
            other => Self::Refused {
                request,
                code: other.escape_ascii().take(40).map(char::from).collect(),
            },
        }
    }

    /// True when the node does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound(_))
    }

    /// True when the connection is beyond use: nothing but connecting anew can help.
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::Gone { .. } | Self::Protocol { .. }
        )
    }
}
