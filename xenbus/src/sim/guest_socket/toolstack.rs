//! dom0's end.

use std::path::Path;

use zerocopy::IntoBytes;

use super::connection::{Connection, Details};
use super::protocol::RequestKind;
use crate::platform::XenError;
use crate::types::{DomId, PciDevice};

/// dom0's toolstack in a process of its own.
#[derive(Debug)]
pub struct SocketToolstack {
    connection: Connection,
}

impl SocketToolstack {
    /// Connects to a machine's `machine.sock` as dom0.
    ///
    /// # Errors
    /// Why it could not be reached.
    pub fn connect(machine_sock: impl AsRef<Path>) -> Result<Self, XenError> {
        let connection = Connection::open(machine_sock.as_ref(), DomId::DOM0)?;
        Ok(Self { connection })
    }

    /// [`crate::sim::Machine::create_domain`], for a PV guest.
    ///
    /// # Errors
    /// EINVAL for a name of none or more than 64 printable characters, or with a slash.
    pub fn create_domain(&self, name: &str) -> Result<DomId, XenError> {
        let details = Details {
            more: name.as_bytes(),
            ..Details::default()
        };
        let operation = || format!("creating domain {name}");
        let kind = RequestKind::CreateDomain;
        let answer = self.connection.request_with(kind, details, operation)?;
        u16::try_from(answer.value)
            .map(DomId)
            .map_err(|_| XenError::from_errno(operation(), libc::EIO))
    }

    fn with_device(
        &self,
        kind: RequestKind,
        domain: DomId,
        device: PciDevice,
        what: &str,
    ) -> Result<(), XenError> {
        let number = u64::from(device.sbdf());
        let details = Details {
            argument: domain.0.into(),
            more: number.as_bytes(),
            descriptor: None,
        };
        let operation = || format!("{what} {device}, domain {domain}");
        self.connection
            .request_with(kind, details, operation)
            .map(drop)
    }

    /// [`crate::sim::Machine::pci_attach`].
    ///
    /// # Errors
    /// EBUSY when a domain has it; ETIMEDOUT when the backend does not connect; what Xen says.
    pub fn pci_attach(&self, domain: DomId, device: PciDevice) -> Result<(), XenError> {
        self.with_device(RequestKind::AttachDevice, domain, device, "attaching")
    }

    /// [`crate::sim::Machine::pci_detach`].
    ///
    /// # Errors
    /// ENODEV when it is not attached; ETIMEDOUT when the backend does not follow; what Xen says.
    pub fn pci_detach(&self, domain: DomId, device: PciDevice) -> Result<(), XenError> {
        self.with_device(RequestKind::DetachDevice, domain, device, "detaching")
    }

    /// [`crate::sim::Machine::unpause_domain`].
    ///
    /// # Errors
    /// ESRCH.
    pub fn unpause_domain(&self, domain: DomId) -> Result<(), XenError> {
        let operation = || format!("unpausing domain {domain}");
        self.connection
            .request(RequestKind::Unpause, domain.0.into(), operation)
            .map(drop)
    }

    /// [`crate::sim::Machine::destroy_domain`].
    ///
    /// # Errors
    /// ESRCH.
    pub fn destroy_domain(&self, domain: DomId) -> Result<(), XenError> {
        let operation = || format!("destroying domain {domain}");
        self.connection
            .request(RequestKind::Destroy, domain.0.into(), operation)
            .map(drop)
    }
}
