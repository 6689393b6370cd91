//! The machine as device models see it.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;

use super::Hvm;
use super::interrupts::Message;
use super::memory::Mapped;
use super::ranges::Ranges;
use crate::device_model::{DeviceModel, ForeignMapping, IntxPin, IoRange, IoSpace, IoreqServerId};
use crate::platform::{PageMapping, XenError};
use crate::sim::evtchn::Ports;
use crate::sim::grants::MappedPage;
use crate::sim::machine::about;
use crate::sim::{Machine, lock};
use crate::types::DomId;

/// Interrupts of the ISA bus.
const ISA_IRQS: u8 = 16;

impl Machine {
    /// Does something with an HVM guest that is alive.
    ///
    /// # Errors
    /// ESRCH, EINVAL when it is not an HVM guest, `body`'s.
    pub(super) fn with_hvm<T>(
        &self,
        domain: DomId,
        body: impl FnOnce(&mut Hvm, &mut Ports) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut hypervisor = lock(&self.inner.hypervisor);
        let domain = hypervisor.alive(domain)?;
        body(domain.hvm.as_mut().ok_or(Errno::EINVAL)?, &mut domain.ports)
    }

    /// Changes what a server has claimed in one space.
    fn with_ranges(
        &self,
        domain: DomId,
        server: IoreqServerId,
        space: IoSpace,
        change: impl FnOnce(&mut Ranges) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        self.with_hvm(domain, |hvm, _| {
            let ranges = hvm.servers.get_mut(server)?.ranges(space);
            change(ranges.ok_or(Errno::EINVAL)?)
        })
    }

    /// Counts a mapping as dom0's.
    fn hold(&self, domain: DomId) -> Hold {
        if let Some(hvm) = lock(&self.inner.hypervisor).hvm_mut(domain) {
            hvm.held = hvm.held.saturating_add(1);
        }
        Hold {
            machine: self.clone(),
            domain,
        }
    }
}

/// Keeps a dead guest from being forgotten.
#[derive(Debug)]
struct Hold {
    machine: Machine,
    domain: DomId,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut hypervisor = lock(&self.machine.inner.hypervisor);
        if let Some(hvm) = hypervisor.hvm_mut(self.domain) {
            hvm.held = hvm.held.saturating_sub(1);
        }
        hypervisor.bury(self.domain);
    }
}

/// A server's page in dom0. Fields are dropped in their order.
#[derive(Debug)]
struct HeldPage {
    page: MappedPage,
    _hold: Hold,
}

// SAFETY: a `MappedPage` is 4096 bytes, mapped readable and writable at a page boundary until it is dropped, and cannot be shrunk.
unsafe impl PageMapping for HeldPage {
    fn base(&self) -> NonNull<u8> {
        self.page.base()
    }
}

/// A guest's memory in dom0. Fields are dropped in their order.
#[derive(Debug)]
struct HeldMemory {
    memory: Mapped,
    hold: Hold,
}

// SAFETY: `Mapped` has mapped a page of the guest's memory, readable and writable, wherever it says that one is present; the memory's file
// never shrinks. All of its addresses are its own.
unsafe impl ForeignMapping for HeldMemory {
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }

    fn present(&self) -> &[bool] {
        self.memory.present()
    }

    fn retry(&self, page: usize) -> io::Result<bool> {
        let Hold { machine, domain } = &self.hold;
        machine.with_hvm(*domain, |hvm, _| {
            Ok(hvm.memory.map_into(&self.memory, page))
        })?
    }
}

impl DeviceModel for Machine {
    fn create_ioreq_server(&self, domain: DomId) -> Result<IoreqServerId, XenError> {
        let result = self.with_hvm(domain, |hvm, ports| hvm.servers.create(hvm.vcpus, ports));
        about(
            format!("making an IOREQ server for domain {domain}"),
            result,
        )
    }

    fn destroy_ioreq_server(&self, domain: DomId, server: IoreqServerId) -> Result<(), XenError> {
        let result = self.with_hvm(domain, |hvm, ports| hvm.servers.destroy(server, ports));
        about(
            format!("destroying IOREQ server {server} of domain {domain}"),
            result,
        )
    }

    fn map_ioreq_page(
        &self,
        domain: DomId,
        server: IoreqServerId,
    ) -> Result<Box<dyn PageMapping>, XenError> {
        let result = self.with_hvm(domain, |hvm, _| hvm.servers.get_mut(server)?.map_page());
        let page = about(
            format!("mapping the page of IOREQ server {server} of domain {domain}"),
            result,
        )?;
        let _hold = self.hold(domain);
        Ok(Box::new(HeldPage { page, _hold }))
    }

    fn map_io_range(
        &self,
        domain: DomId,
        server: IoreqServerId,
        range: IoRange,
    ) -> Result<(), XenError> {
        let result = self.with_ranges(domain, server, range.space, |ranges| {
            ranges.add(range.first, range.last)
        });
        about(
            format!("claiming {range} of domain {domain} for IOREQ server {server}"),
            result,
        )
    }

    fn unmap_io_range(
        &self,
        domain: DomId,
        server: IoreqServerId,
        range: IoRange,
    ) -> Result<(), XenError> {
        let result = self.with_ranges(domain, server, range.space, |ranges| {
            ranges.remove(range.first, range.last)
        });
        about(
            format!("taking {range} of domain {domain} from IOREQ server {server}"),
            result,
        )
    }

    fn set_ioreq_server_state(
        &self,
        domain: DomId,
        server: IoreqServerId,
        enabled: bool,
    ) -> Result<(), XenError> {
        let result = self.with_hvm(domain, |hvm, _| {
            let server = hvm.servers.get_mut(server)?;
            if enabled {
                server.enable();
            } else {
                server.enabled = false;
            }
            Ok(())
        });
        about(
            format!("setting the state of IOREQ server {server} of domain {domain}"),
            result,
        )
    }

    fn vcpu_count(&self, domain: DomId) -> Result<u32, XenError> {
        let result = self.with_hvm(domain, |hvm, _| Ok(hvm.vcpus));
        about(
            format!("asking for the number of CPUs of domain {domain}"),
            result,
        )
    }

    fn set_pci_intx_level(&self, domain: DomId, pin: IntxPin, level: bool) -> Result<(), XenError> {
        let result = self.with_hvm(domain, |hvm, _| {
            if pin.device > 31 || pin.pin > 3 {
                return Err(Errno::EINVAL);
            }
            hvm.interrupts.set_pin(pin, level);
            Ok(())
        });
        about(format!("setting an INTx pin of domain {domain}"), result)
    }

    fn set_isa_irq_level(&self, domain: DomId, irq: u8, level: bool) -> Result<(), XenError> {
        let result = self.with_hvm(domain, |hvm, _| {
            if irq >= ISA_IRQS {
                return Err(Errno::EINVAL);
            }
            hvm.interrupts.set_isa(irq, level);
            Ok(())
        });
        about(
            format!("setting ISA interrupt {irq} of domain {domain}"),
            result,
        )
    }

    fn inject_msi(&self, domain: DomId, address: u64, data: u32) -> Result<(), XenError> {
        let result = self.with_hvm(domain, |hvm, _| {
            // Vector 0 would be a PIRQ that is mapped to an emulated device, of which there are none here.
            if data & 0xff == 0 {
                return Err(Errno::EINVAL);
            }
            hvm.interrupts.send(Message { address, data });
            Ok(())
        });
        about(format!("injecting a message into domain {domain}"), result)
    }

    fn map_foreign(
        &self,
        domain: DomId,
        first: u64,
        count: usize,
    ) -> io::Result<Box<dyn ForeignMapping>> {
        let memory = self.with_hvm(domain, |hvm, _| Ok(hvm.memory.map(first, count)))??;
        let hold = self.hold(domain);
        Ok(Box::new(HeldMemory { memory, hold }))
    }
}

/// What tests look at.
impl Machine {
    /// How many mappings dom0 has of an HVM guest's memory and of its servers' pages. While there are any, a guest that was destroyed is
    /// not forgotten. `None`: there is no such guest, not even a dead one.
    pub fn held_by_dom0(&self, domain: DomId) -> Option<usize> {
        let mut hypervisor = lock(&self.inner.hypervisor);
        hypervisor.hvm_mut(domain).map(|hvm| hvm.held)
    }

    /// What an IOREQ server has claimed; empty when there is none of that number.
    pub fn claimed(&self, domain: DomId, server: IoreqServerId) -> Vec<IoRange> {
        let result = self.with_hvm(domain, |hvm, _| Ok(hvm.servers.get(server)?.claimed()));
        result.unwrap_or_default()
    }

    pub(super) fn interrupts_of(
        &self,
        domain: DomId,
    ) -> Result<Arc<super::interrupts::Interrupts>, Errno> {
        self.with_hvm(domain, |hvm, _| Ok(Arc::clone(&hvm.interrupts)))
    }
}
