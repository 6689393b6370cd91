//! The devices that a guest has, and where it sees them.

use std::sync::Arc;
use std::time::Duration;

use conf_space::address::Bdf;
use conf_space::overlay::{BuildError, Overlay, OverlayState, Policy};
use conf_space::topology::{PlaceError, Placement, Topology, TopologyKind};
use log::warn;
use xenbus::{DomId, Xen};

use super::aer::Work;
use super::policy::CurrentPolicy;
use crate::config::Intx;
use crate::host::config_state;
use crate::host::devices::{Claim, Device, DeviceError, Devices, Line, silence};
use crate::host::interrupts::Interrupts;
use crate::host::record::{Flags, Owner, Phase, RunTime};
use crate::text::chain;

/// A device that a guest cannot have.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// It is not to be had, for now or at all.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It is nothing for a guest.
    #[error(transparent)]
    Unfit(#[from] BuildError),
    /// It has memory in a page with another's.
    #[error(
        "{bdf} has memory in the page at {page:#x} together with {with}, which its guest could reach through it. Give both to the same guest, \
         or keep them apart (dom0's Linux: pci=resource_alignment=12@{bdf}), or set allow_shared_pages = true for {bdf}"
    )]
    SharedPage {
        /// The device.
        bdf: Bdf,
        /// The page's address.
        page: u64,
        /// The other device, and who has it.
        with: String,
    },
    /// There is no place for it in the guest.
    #[error("{bdf} cannot be placed on the guest's PCI bus")]
    Place {
        /// The device.
        bdf: Bdf,
        /// Why.
        #[source]
        source: PlaceError,
    },
}

impl ExportError {
    /// Whether waiting helps: the device is on its way to be free.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Device(DeviceError::Busy { .. }))
    }
}

/// A device as one guest has it.
#[derive(Debug)]
pub struct Export {
    /// The device.
    pub device: Arc<Device>,
    /// Its address in the guest.
    pub seen_as: Bdf,
    /// What the guest sees and may change of it.
    pub overlay: Overlay,
    /// Its message-signalled interrupts.
    pub interrupts: Interrupts,
    /// What the operator allows the guest with it.
    policy: CurrentPolicy,
    /// A write was dropped, and that was logged.
    pub told_of_dropped_write: bool,
    /// Its recovery from an error.
    pub recovery_work: Work,
}

impl Export {
    /// What the operator allows the guest with this device now.
    pub fn policy(&mut self) -> Policy {
        self.policy.get(&self.device.record, &mut self.overlay)
    }

    /// Whether the toolstack took it back and the guest did not answer: it is not served any more.
    pub fn is_revoked(&self) -> bool {
        self.device.record.flags().contains(Flags::REVOKED)
    }

    /// What the device's command register is to hold while the guest has it.
    pub fn command(&self) -> u16 {
        let saved = self.device.record.config();
        self.overlay
            .command_to_restore(config_state::saved_command(&saved))
    }

    /// Puts back the configuration and the interrupts that the device lost when it woke up, or was reset. It cannot be touched before
    /// `settled`.
    pub fn restore(&self, settled: Duration) {
        std::thread::sleep(settled);
        let saved = self.device.record.config();
        config_state::restore(&*self.device.config, &saved, self.command());
        self.interrupts.restore();
    }
}

/// A guest's devices.
#[derive(Debug)]
pub struct Exports {
    domain: DomId,
    topology: Topology,
    list: Vec<Export>,
    devices: Arc<Devices>,
    xen: Arc<dyn Xen>,
    /// The guest that this one is a stub domain of.
    target: Option<DomId>,
}

impl Exports {
    /// None yet.
    pub fn new(
        domain: DomId,
        kind: TopologyKind,
        devices: Arc<Devices>,
        xen: Arc<dyn Xen>,
    ) -> Self {
        Self {
            domain,
            topology: Topology::new(kind),
            list: Vec::new(),
            devices,
            xen,
            target: None,
        }
    }

    /// Of a guest that is the stub domain of this one, if of any.
    #[must_use]
    pub fn on_behalf_of(mut self, target: Option<DomId>) -> Self {
        self.target = target;
        self
    }

    /// The guest.
    pub fn domain(&self) -> DomId {
        self.domain
    }

    /// The guest to name to the toolstack: for a stub domain the one whose it is.
    pub fn guest(&self) -> DomId {
        self.target.unwrap_or(self.domain)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Export> {
        self.list.iter()
    }

    /// Whether the guest has to wait for a device of its own.
    pub fn is_withheld(&self, bdf: Bdf) -> bool {
        let mut devices = self.list.iter().map(|export| &export.device);
        devices.any(|device| device.bdf == bdf && device.is_withheld())
    }

    /// Those that the guest is to lose at once, and why.
    pub fn withdrawn(&self) -> impl Iterator<Item = (Bdf, &'static str)> {
        let why = |export: &Export| Some((export.device.bdf, export.device.withdrawn()?));
        self.list.iter().filter_map(why)
    }

    /// All of them, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Export> {
        self.list.iter_mut()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// One of them, by its place among them.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut Export> {
        self.list.get_mut(index)
    }

    /// The topology they are in.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The device that the guest addresses. The numbers are the guest's: none that is out of range finds anything.
    pub fn find(&mut self, domain: u32, bus: u32, devfn: u32) -> Option<&mut Export> {
        self.list.iter_mut().find(|export| {
            let at = export.seen_as;
            let (segment, at_bus, at_devfn) = (at.segment(), at.bus(), at.devfn());
            (segment.into(), at_bus.into(), at_devfn.into()) == (domain, bus, devfn)
                && !export.is_revoked()
                && !export.device.is_withheld()
        })
    }

    /// Gives a device to the guest and returns where the guest sees it: where it did before, if it has had it since before a restart
    /// of the daemon. To be called again when it is withheld ([`Device::is_withheld`]).
    ///
    /// # Errors
    /// [`ExportError`]; nothing has changed then.
    pub fn add(&mut self, bdf: Bdf, wished: Option<u8>) -> Result<Bdf, ExportError> {
        if let Some(address) = self.topology.address_of(bdf) {
            return Ok(address);
        }
        let device = self.devices.find(bdf)?;
        let added = self.give(&device, wished);
        if let Err(error) = &added
            && !error.is_temporary()
        {
            self.forget_grants(&device);
        }
        added
    }

    fn give(&mut self, device: &Arc<Device>, wished: Option<u8>) -> Result<Bdf, ExportError> {
        let bdf = device.bdf;
        // Not even looked at before it is this guest's to have: it may be another's, or in the middle of a reset.
        self.devices.check(device, self.domain)?;
        let held = device.held_by(self.domain);
        let identity = &device.description.identity;
        let placement = Placement {
            bdf,
            is_virtual_function: identity.is_virtual_function,
            hint: wished,
        };
        let place = |source| ExportError::Place { bdf, source };
        let mut overlay = Overlay::new(identity, &*device.config)?;
        let address = match held {
            Some(owner) => self
                .topology
                .restore(placement, owner.seen_as)
                .map(|()| owner.seen_as)
                .map_err(place)?,
            None => self.topology.place(placement).map_err(place)?,
        };
        let owner = Owner {
            domain: self.domain,
            seen_as: address,
        };
        let claimed = self.claim(device, owner, overlay.state());
        let (claim, line) = claimed.inspect_err(|_| {
            self.topology.remove(bdf);
        })?;
        if claim == Claim::Resumed {
            overlay.set_state(OverlayState::from_bits(device.record.overlay()));
        }
        if line == Line::Refused {
            overlay = overlay.without_intx();
        }
        self.accept_grants(device);
        match line {
            Line::Usable => {
                if let Err(error) = self.devices.bus().give_line(bdf, self.domain) {
                    warn!("{bdf}: its guest has no interrupts by its INTx line: {error}");
                }
            }
            Line::Refused => match silence(&*device.config) {
                Ok(true) => {}
                Ok(false) => warn!(
                    "{bdf} cannot be kept off its interrupt line; if it raises it, dom0 may switch the line off for all devices on it"
                ),
                Err(error) => warn!("{bdf}: {}", chain(&error)),
            },
        }
        let interrupts = Interrupts::new(Arc::clone(device), self.domain, Arc::clone(&self.xen));
        let policy = CurrentPolicy::new(
            Arc::clone(self.devices.config()),
            device,
            self.target.is_some(),
        );
        self.list.push(Export {
            device: Arc::clone(device),
            policy,
            seen_as: address,
            overlay,
            interrupts,
            told_of_dropped_write: false,
            recovery_work: Work::default(),
        });
        Ok(address)
    }

    /// Claims a device for the guest, if it can have it, with or without its INTx line.
    fn claim(
        &self,
        device: &Device,
        owner: Owner,
        overlay: OverlayState,
    ) -> Result<(Claim, Line), ExportError> {
        let held = device.is_held_by(self.domain);
        let _alone = (!held).then(|| self.devices.admission());
        // What was decided once still holds: the guest relies on it.
        let line = if held {
            device.line()
        } else {
            self.admit(device)?
        };
        let claim = self.devices.claim(device, owner, overlay.to_bits(), line)?;
        Ok((claim, line))
    }

    /// Whether the guest can have a device in view of who has those beside it, and whether it can have its INTx line, too.
    fn admit(&self, device: &Device) -> Result<Line, ExportError> {
        let (bdf, domain) = (device.bdf, self.domain);
        let sharing = self.devices.sharing(device, domain);
        let sharing = sharing.map_err(DeviceError::from)?;
        let settings = self.devices.settings(device);
        if let Some(shared) = sharing.pages.first()
            && !settings.allow_shared_pages
        {
            return Err(ExportError::SharedPage {
                bdf,
                page: shared.what,
                with: shared.to_string(),
            });
        }
        if settings.intx == Intx::Off {
            return Ok(Line::Refused);
        }
        match sharing.line.first() {
            Some(shared) if !settings.allow_shared_interrupt => {
                warn!(
                    "domain {domain} has {bdf} without its interrupt line {}, which {shared} uses: its driver needs MSI or MSI-X. If that has \
                     neither: give both to the same guest, take dom0's driver from the other, or set allow_shared_interrupt = true for {bdf}",
                    shared.what
                );
                Ok(Line::Refused)
            }
            _ => Ok(Line::Usable),
        }
    }

    /// Whether what a toolstack set for a guest is for this one. A toolstack that gives a device to a guest with a stub domain names the
    /// guest.
    fn is_meant(&self, meant_for: Option<DomId>) -> bool {
        meant_for.is_none_or(|domain| domain == self.domain || Some(domain) == self.target)
    }

    /// What was set for this guest before it got the device holds; what was set for another that never got it does not.
    fn accept_grants(&self, device: &Device) {
        device.record.update_settings(|settings| {
            if !self.is_meant(settings.meant_for) {
                *settings = RunTime::default();
            }
            settings.meant_for = None;
        });
    }

    /// What was set for a guest that cannot have the device is not for the next one.
    fn forget_grants(&self, device: &Device) {
        if device.record.phase() != Some(Phase::Assigned)
            && self.is_meant(device.record.settings().meant_for)
        {
            device
                .record
                .update_settings(|settings| *settings = RunTime::default());
        }
    }

    /// Takes a device from the guest. `false`: the guest does not have it.
    pub fn remove(&mut self, bdf: Bdf) -> bool {
        let Some(index) = self.list.iter().position(|export| export.device.bdf == bdf) else {
            // One that could not be taken up after a restart is the guest's all the same.
            let device = self.devices.get(bdf);
            let held = device.filter(|device| device.is_held_by(self.domain));
            return held
                .inspect(|device| self.devices.release(device))
                .is_some();
        };
        let export = self.list.swap_remove(index);
        self.let_go(&export);
        true
    }

    /// Ends the guest's use of a device that it does not let go: its operations find nothing, its message-signalled interrupts are off. The
    /// device stays its own. `false`: the guest does not have it, or that was done before.
    pub fn revoke(&mut self, bdf: Bdf) -> bool {
        let mut used = self.list.iter().filter(|export| !export.is_revoked());
        let Some(export) = used.find(|export| export.device.bdf == bdf) else {
            return false;
        };
        if let Err(error) = export.interrupts.disable() {
            log::error!("{bdf}: {}", chain(&error));
        }
        // Last: a daemon that is killed before does it again.
        export.device.record.insert(Flags::REVOKED);
        true
    }

    /// Takes everything from the guest.
    pub fn clear(&mut self) {
        for export in std::mem::take(&mut self.list) {
            self.let_go(&export);
        }
        // And what a daemon that was killed had just claimed for it.
        self.devices.release_all_of(self.domain);
    }

    fn let_go(&mut self, export: &Export) {
        self.topology.remove(export.device.bdf);
        self.devices.release(&export.device);
    }
}
