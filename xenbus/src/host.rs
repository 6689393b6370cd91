//! The Xen that this dom0 runs on.

use crate::event_channel::{self, EventChannel};
use crate::grant::{self, GrantedPage};
use crate::platform::{DomainInfo, EventPort, MsiRequest, PageMapping, Xen, XenError};
use crate::privcmd::{Domctl, Privcmd};
use crate::types::{DomId, GrantRef, PciDevice, Pirq, Port};
use crate::xenstore;

/// The hypervisor below us, by Linux's devices in `/dev/xen`.
#[derive(Debug)]
pub struct Host {
    privcmd: Privcmd,
    domctl: Domctl,
}

impl Host {
    /// Opens what is needed, all of it at once, so that a missing device shows at start and not
    /// with the first guest.
    ///
    /// # Errors
    /// [`XenError::Device`].
    pub fn new() -> Result<Self, XenError> {
        event_channel::open_device()?;
        grant::open_device()?;
        Ok(Self {
            privcmd: Privcmd::open()?,
            domctl: Domctl::default(),
        })
    }
}

impl Xen for Host {
    fn connect_xenstore(&self) -> Result<xenstore::Client, xenstore::Error> {
        xenstore::Client::connect()
    }

    fn map_page(
        &self,
        domain: DomId,
        reference: GrantRef,
    ) -> Result<Box<dyn PageMapping>, XenError> {
        Ok(Box::new(GrantedPage::map(domain, reference)?))
    }

    fn bind_interdomain(&self, domain: DomId, port: Port) -> Result<Box<dyn EventPort>, XenError> {
        Ok(Box::new(EventChannel::bind_interdomain(domain, port)?))
    }

    fn domain_info(&self, domain: DomId) -> Result<Option<DomainInfo>, XenError> {
        self.domctl.domain_info(&self.privcmd, domain)
    }

    fn map_msi(
        &self,
        domain: DomId,
        device: PciDevice,
        request: MsiRequest,
    ) -> Result<Pirq, XenError> {
        self.privcmd.map_msi(domain, device, request)
    }

    fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<(), XenError> {
        self.privcmd.unmap_pirq(domain, pirq)
    }

    fn prepare_msix(&self, device: PciDevice) -> Result<(), XenError> {
        self.privcmd.prepare_msix(device)
    }

    fn release_msix(&self, device: PciDevice) -> Result<(), XenError> {
        self.privcmd.release_msix(device)
    }

    fn restore_msi(&self, device: PciDevice) -> Result<(), XenError> {
        self.privcmd.restore_msi(device)
    }

    fn assign_device(&self, domain: DomId, device: PciDevice) -> Result<(), XenError> {
        self.domctl.assign_device(&self.privcmd, domain, device)
    }

    fn deassign_device(&self, domain: DomId, device: PciDevice) -> Result<(), XenError> {
        self.domctl.deassign_device(&self.privcmd, domain, device)
    }
}
