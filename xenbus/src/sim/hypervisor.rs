//! Domains, and what hypercalls do with them, by Xen's rules.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::address_space::{AddressSpace, Reaching};
use super::evtchn::{GuestEnd, Ports};
use super::grants::GrantTable;
use super::hardware::{Hardware, NoHardware};
use super::hvm::Hvm;
use super::interrupts::Interrupts;
use super::lock;
use super::msi::Mapped;
use super::passthrough::Device;
use super::{DomainKind, MachineOptions};
use crate::platform::DomainInfo;
use crate::types::{DomId, PciDevice, Pirq, Port};

/// A domain as Xen knows it.
#[derive(Debug)]
pub(super) struct Domain {
    pub kind: DomainKind,
    /// It has been unpaused for the first time: the toolstack is done with building it.
    pub started: bool,
    /// It was paused after that.
    pub paused: bool,
    pub shut_down: bool,
    /// It was destroyed, and is still here only because somebody maps its pages.
    pub dying: bool,
    pub grants: GrantTable,
    pub ports: Ports,
    pub pirqs: BTreeMap<Pirq, Mapped>,
    /// To be locked before the hypervisor, never after it.
    pub address_space: Arc<Mutex<AddressSpace>>,
    /// Its devices that reach what is in there.
    pub reaching: Reaching,
    /// What only an HVM domain has.
    pub hvm: Option<Hvm>,
}

impl Domain {
    /// Whether dom0 maps something of it.
    fn is_held(&self) -> bool {
        self.grants.mappings() > 0 || self.hvm.as_ref().is_some_and(Hvm::is_held)
    }
}

/// Everything that Xen knows.
#[derive(Debug)]
pub(super) struct Hypervisor {
    pub domains: BTreeMap<DomId, Domain>,
    pub devices: BTreeMap<PciDevice, Device>,
    pub hardware: Arc<dyn Hardware>,
    pub options: MachineOptions,
    /// Bytes that all guests have given their devices.
    pub given: u64,
    pub interrupts: Arc<Mutex<Interrupts>>,
    last: u16,
}

impl Hypervisor {
    pub fn new(options: MachineOptions, interrupts: Arc<Mutex<Interrupts>>) -> Self {
        let hardware = Arc::new(NoHardware);
        Self {
            domains: BTreeMap::new(),
            devices: BTreeMap::new(),
            hardware,
            options,
            given: 0,
            interrupts,
            last: 0,
        }
    }

    /// Makes a domain, not yet started.
    ///
    /// # Errors
    /// ENOSPC when all numbers were used: none is given twice. ENOMEM.
    pub fn create(&mut self, kind: DomainKind) -> Result<DomId, Errno> {
        let id = DomId(self.last.saturating_add(1));
        if id >= DomId::FIRST_RESERVED {
            return Err(Errno::ENOSPC);
        }
        self.last = id.0;
        let (vcpus, memory) = (self.options.hvm_vcpus, self.options.hvm_memory);
        let hvm = (kind == DomainKind::Hvm).then(|| Hvm::new(vcpus, memory));
        let hvm = hvm.transpose().map_err(|_| Errno::ENOMEM)?;
        let reaching = Reaching::default();
        let domain = Domain {
            kind,
            started: false,
            paused: false,
            shut_down: false,
            dying: false,
            grants: GrantTable::default(),
            ports: Ports::default(),
            pirqs: BTreeMap::new(),
            address_space: Arc::new(Mutex::new(AddressSpace::new(reaching.clone()))),
            reaching,
            hvm,
        };
        self.domains.insert(id, domain);
        Ok(id)
    }

    /// A domain that can still do something.
    ///
    /// # Errors
    /// ESRCH.
    pub fn alive(&mut self, id: DomId) -> Result<&mut Domain, Errno> {
        self.domains
            .get_mut(&id)
            .filter(|domain| !domain.dying)
            .ok_or(Errno::ESRCH)
    }

    /// An HVM domain, dead or alive.
    pub fn hvm_mut(&mut self, id: DomId) -> Option<&mut Hvm> {
        self.domains.get_mut(&id)?.hvm.as_mut()
    }

    pub fn info(&self, id: DomId) -> Option<DomainInfo> {
        if id == DomId::DOM0 {
            return Some(DomainInfo {
                hvm: false,
                paused: false,
                has_run: true,
                gone: false,
            });
        }
        let domain = self.domains.get(&id)?;
        Some(DomainInfo {
            hvm: domain.kind == DomainKind::Hvm,
            paused: !domain.started || domain.paused,
            has_run: domain.started,
            gone: domain.shut_down || domain.dying,
        })
    }

    /// Destroys a domain: its devices go to quarantine, its interrupts, ports and grants are gone. It stays known as long as its pages are
    /// mapped.
    ///
    /// # Errors
    /// ESRCH.
    pub fn destroy(&mut self, id: DomId) -> Result<(), Errno> {
        let pirqs: Vec<_> = self.alive(id)?.pirqs.keys().copied().collect();
        for pirq in pirqs {
            // Fails for all but the first of a block, which goes with it.
            let _ = self.unmap_pirq(id, pirq);
        }
        for device in self
            .devices
            .values_mut()
            .filter(|device| device.owner == id)
        {
            device.owner = DomId::IO;
        }
        let domain = self.alive(id)?;
        domain.dying = true;
        domain.ports = Ports::default();
        domain.grants.clear();
        if let Some(hvm) = &mut domain.hvm {
            hvm.end();
        }
        self.bury(id);
        Ok(())
    }

    /// Forgets a dead domain that nothing holds any more.
    pub fn bury(&mut self, id: DomId) {
        if self
            .domains
            .get(&id)
            .is_some_and(|domain| domain.dying && !domain.is_held())
        {
            self.domains.remove(&id);
        }
    }

    /// `EVTCHNOP_bind_pirq`, as `id`.
    ///
    /// # Errors
    /// EINVAL when the PIRQ is not mapped, EEXIST when it has a port, ENOSPC when there is no port left.
    pub fn bind_pirq(&mut self, id: DomId, pirq: Pirq) -> Result<GuestEnd, Errno> {
        let interrupts = Arc::clone(&self.interrupts);
        let domain = self.alive(id)?;
        if !domain.pirqs.contains_key(&pirq) {
            return Err(Errno::EINVAL);
        }
        let mut interrupts = lock(&interrupts);
        let end = domain.ports.bind_pirq(pirq, &*interrupts.bind(id, pirq)?);
        if end.is_err() {
            interrupts.unbind(id, pirq);
        }
        end
    }

    /// `EVTCHNOP_close`, as `id`.
    ///
    /// # Errors
    /// EINVAL when there is no such port.
    pub fn close_port(&mut self, id: DomId, port: Port) -> Result<(), Errno> {
        if let Some(pirq) = self.alive(id)?.ports.close(port)? {
            lock(&self.interrupts).unbind(id, pirq);
        }
        Ok(())
    }
}
