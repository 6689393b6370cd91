//! Whose DMA a device does: `XEN_DOMCTL_assign_device` and `XEN_DOMCTL_deassign_device`, by the rules of Xen 4.17.

use nix::errno::Errno;

use super::hardware::Registers;
use super::hypervisor::Hypervisor;
use crate::types::{DomId, PciDevice};

/// What Xen keeps of a device.
#[derive(Debug)]
pub(super) struct Device {
    pub owner: DomId,
    pub msix_prepared: bool,
}

impl Hypervisor {
    /// A device that exists.
    ///
    /// # Errors
    /// ENODEV.
    pub fn device(&mut self, device: PciDevice) -> Result<&mut Device, Errno> {
        if !(Registers {
            hardware: &*self.hardware,
            device,
        })
        .present()
        {
            // As dom0 tells Xen of a device that was removed: one that comes back is a new one.
            self.devices.remove(&device);
            return Err(Errno::ENODEV);
        }
        Ok(self.devices.entry(device).or_insert(Device {
            owner: DomId::DOM0,
            msix_prepared: false,
        }))
    }

    /// The domain that a domctl about devices is for.
    fn target(&mut self, domain: DomId) -> Result<(), Errno> {
        if domain == DomId::DOM0 {
            // dom0 does not give devices to itself.
            return Err(Errno::EINVAL);
        }
        if domain != DomId::IO {
            self.alive(domain)?;
        }
        if self.options.iommu {
            Ok(())
        } else {
            Err(Errno::EOPNOTSUPP)
        }
    }

    /// Gives a device to a domain, or to quarantine.
    ///
    /// # Errors
    /// ESRCH, EOPNOTSUPP, ENODEV; EBUSY when another guest has it; EINVAL for dom0.
    pub fn assign(&mut self, domain: DomId, device: PciDevice) -> Result<(), Errno> {
        self.target(domain)?;
        let record = self.device(device)?;
        if record.owner != DomId::DOM0 && record.owner != DomId::IO {
            return Err(Errno::EBUSY);
        }
        record.owner = domain;
        Ok(())
    }

    /// Takes a device from a domain: to quarantine, and out of quarantine to dom0.
    ///
    /// # Errors
    /// ESRCH, EOPNOTSUPP, EINVAL for dom0; ENODEV when it is not that domain's.
    pub fn deassign(&mut self, domain: DomId, device: PciDevice) -> Result<(), Errno> {
        self.target(domain)?;
        let record = self.device(device)?;
        if record.owner != domain {
            return Err(Errno::ENODEV);
        }
        record.owner = if domain == DomId::IO {
            DomId::DOM0
        } else {
            DomId::IO
        };
        Ok(())
    }
}
