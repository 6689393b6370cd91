//! Connecting to the frontend: what it offers, and taking it up.

use std::os::fd::AsRawFd;

use log::{error, warn};
use mio::Interest;
use mio::unix::SourceFd;
use xenbus::pciif::MAGIC;
use xenbus::xenstore::{Error as StoreError, Store};
use xenbus::{GrantRef, Port, XenError, XenbusState};

use super::link::Link;
use super::{PORT, Session, SessionError};
use crate::text::chain;

/// What the frontend offers cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrontendError {
    #[error("its node {node}")]
    Node {
        node: &'static str,
        #[source]
        source: StoreError,
    },
    #[error("it speaks version '{found}' of the interface, not '{MAGIC}'")]
    Magic { found: String },
    #[error("its page cannot be mapped")]
    Page(#[source] XenError),
    #[error("its event channel cannot be bound")]
    Port(#[source] XenError),
}

impl Session {
    /// The frontend cannot be connected: the guest's own affair, told in the error node.
    pub(super) fn fail(
        &mut self,
        current: XenbusState,
        error: &FrontendError,
    ) -> Result<(), SessionError> {
        let why = chain(error);
        if self.log_limit.allow() {
            error!(
                "domain {}: its PCI frontend cannot be connected: {why}",
                self.setup.domain
            );
        }
        self.store
            .write(&self.paths.error, format!("{} {why}", libc::EINVAL))?;
        self.show(current, XenbusState::Closing)
    }

    /// The page and the port that the frontend offers.
    pub(super) fn offer(&mut self) -> Result<(GrantRef, Port), FrontendError> {
        let node = |node| move |source| FrontendError::Node { node, source };
        let reference = self
            .store
            .read_number(&self.paths.theirs("pci-op-ref"))
            .map_err(node("pci-op-ref"))?;
        let remote = self
            .store
            .read_number(&self.paths.theirs("event-channel"))
            .map_err(node("event-channel"))?;
        Ok((reference, remote))
    }

    pub(super) fn connect(&mut self) -> Result<(), FrontendError> {
        self.disconnect();
        let domain = self.setup.domain;
        let magic = self
            .store
            .read_string(&self.paths.theirs("magic"))
            .map_err(|source| FrontendError::Node {
                node: "magic",
                source,
            })?;
        if magic != MAGIC {
            return Err(FrontendError::Magic {
                found: magic.chars().take(20).collect(),
            });
        }
        let (reference, remote) = self.offer()?;
        let page = self
            .setup
            .xen
            .map_page(domain, reference)
            .map_err(FrontendError::Page)?;
        let port = self
            .setup
            .xen
            .bind_interdomain(domain, remote)
            .map_err(FrontendError::Port)?;
        let mut link = Link::new(page, port);
        self.withdraw_stale(&mut link);
        if let Err(error) = self.poll.registry().register(
            &mut SourceFd(&link.fd().as_raw_fd()),
            PORT,
            Interest::READABLE,
        ) {
            return Err(FrontendError::Port(XenError::Failed {
                operation: "waiting for events".into(),
                source: error,
            }));
        }
        self.link = Some(link);
        self.linked_to = Some((reference, remote));
        Ok(())
    }

    pub(super) fn disconnect(&mut self) {
        self.linked_to = None;
        let Some(link) = self.link.take() else { return };
        self.abandon_recoveries();
        if let Err(error) = self
            .poll
            .registry()
            .deregister(&mut SourceFd(&link.fd().as_raw_fd()))
        {
            warn!("domain {}: {error}", self.setup.domain);
        }
    }
}
