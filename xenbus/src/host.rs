//! The Xen that this dom0 runs on.

use std::io;

use crate::device_model::{DeviceModel, ForeignMapping, IntxPin, IoRange, IoreqServerId};
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

impl DeviceModel for Host {
    fn create_ioreq_server(&self, domain: DomId) -> Result<IoreqServerId, XenError> {
        self.privcmd.create_ioreq_server(domain)
    }

    fn destroy_ioreq_server(&self, domain: DomId, server: IoreqServerId) -> Result<(), XenError> {
        self.privcmd.destroy_ioreq_server(domain, server)
    }

    fn map_ioreq_page(
        &self,
        domain: DomId,
        server: IoreqServerId,
    ) -> Result<Box<dyn PageMapping>, XenError> {
        self.privcmd.map_ioreq_page(domain, server)
    }

    fn map_io_range(
        &self,
        domain: DomId,
        server: IoreqServerId,
        range: IoRange,
    ) -> Result<(), XenError> {
        self.privcmd.map_io_range(domain, server, range)
    }

    fn unmap_io_range(
        &self,
        domain: DomId,
        server: IoreqServerId,
        range: IoRange,
    ) -> Result<(), XenError> {
        self.privcmd.unmap_io_range(domain, server, range)
    }

    fn set_ioreq_server_state(
        &self,
        domain: DomId,
        server: IoreqServerId,
        enabled: bool,
    ) -> Result<(), XenError> {
        self.privcmd.set_ioreq_server_state(domain, server, enabled)
    }

    fn vcpu_count(&self, domain: DomId) -> Result<u32, XenError> {
        self.privcmd.vcpu_count(domain)
    }

    fn set_pci_intx_level(&self, domain: DomId, pin: IntxPin, level: bool) -> Result<(), XenError> {
        self.privcmd.set_pci_intx_level(domain, pin, level)
    }

    fn set_isa_irq_level(&self, domain: DomId, irq: u8, level: bool) -> Result<(), XenError> {
        self.privcmd.set_isa_irq_level(domain, irq, level)
    }

    fn inject_msi(&self, domain: DomId, address: u64, data: u32) -> Result<(), XenError> {
        self.privcmd.inject_msi(domain, address, data)
    }

    fn map_foreign(
        &self,
        domain: DomId,
        first: u64,
        count: usize,
    ) -> io::Result<Box<dyn ForeignMapping>> {
        self.privcmd.map_foreign(domain, first, count)
    }
}
