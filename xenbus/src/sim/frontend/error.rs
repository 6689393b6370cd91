//! What can go wrong for a frontend.

use std::io;
use std::time::Duration;

use crate::pciif::{Command, PciError};
use crate::platform::XenError;
use crate::state::XenbusState;
use crate::types::PciDevice;
use crate::xenstore;

/// A frontend could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrontendError {
    /// xenstore said no.
    #[error("the frontend cannot use xenstore")]
    Xenstore(#[from] xenstore::Error),
    /// Xen said no.
    #[error("the frontend cannot use Xen")]
    Xen(#[from] XenError),
    /// The event channel is beyond use.
    #[error("the frontend cannot use its event channel")]
    Port(#[from] io::Error),
    /// Nothing is published: there is no page to talk through.
    #[error("the frontend shares no page with its backend: publish first")]
    NotPublished,
    /// The backend did not get where it was expected.
    #[error("the backend is at state {state}, {} ms later still not at {awaited}", waited.as_millis())]
    BackendState {
        /// The state that was waited for.
        awaited: XenbusState,
        /// The state that it is at.
        state: XenbusState,
        /// How long was waited.
        waited: Duration,
    },
    /// A node of the backend's is not as it has to be.
    #[error("the backend's node {path} is '{value}'")]
    Node {
        /// Its path.
        path: String,
        /// Its value.
        value: String,
    },
    /// The backend did not answer an operation.
    #[error("{command} of {function}: no answer from the backend within {} ms", waited.as_millis())]
    NoAnswer {
        /// The operation's number.
        command: u32,
        /// The function's virtual address.
        function: PciDevice,
        /// How long was waited.
        waited: Duration,
    },
    /// The backend refused an operation.
    #[error("{command} of {function}: {error}")]
    Refused {
        /// The operation.
        command: Command,
        /// The function's virtual address.
        function: PciDevice,
        /// The answer.
        error: PciError,
    },
    /// There is no such function, or not with what was asked for.
    #[error("{function} has no {what}")]
    Missing {
        /// The function's virtual address.
        function: PciDevice,
        /// What is not there.
        what: &'static str,
    },
    /// This frontend's original would have stopped its whole kernel here.
    #[error("a guest with this frontend has panicked: the backend's state is {0}")]
    Panicked(XenbusState),
}

impl FrontendError {
    /// The backend's answer, if it refused an operation.
    pub fn pci_error(&self) -> Option<PciError> {
        match self {
            Self::Refused { error, .. } => Some(*error),
            _ => None,
        }
    }
}
