//! PCI devices are attached and detached.

use std::sync::Arc;

use super::domain::{clean_up, make_node, readable_by, remove_node};
use super::{ToolstackError, backend_path, frontend_path, info_path};
use crate::platform::{Xen, XenError};
use crate::sim::hardware::Registers;
use crate::sim::{DomainKind, Machine, lock};
use crate::state::XenbusState;
use crate::types::{DomId, Gsi, PciDevice, Pirq};
use crate::xenstore::{Access, Error, Perm, Store};

/// What stands behind a device in `pci = [...]`.
#[derive(Debug, Clone, Default)]
pub struct PciOptions {
    /// The virtual device and function that is wished for, `vdevfn-N`.
    pub virtual_devfn: Option<u8>,
    /// The device's name (`name=` of xl), `name-N`.
    pub name: Option<String>,
    /// `permissive=1`. Goes into `opts-N`; what makes it take effect is sysfs.
    pub permissive: bool,
    /// `msitranslate=1`.
    pub msi_translate: bool,
    /// `power_mgmt=1`.
    pub power_management: bool,
    /// `rdm_policy=relaxed` instead of strict.
    pub relaxed_rdm: bool,
}

impl PciOptions {
    fn text(&self) -> String {
        format!(
            "msitranslate={},power_mgmt={},permissive={},rdm_policy={}",
            u8::from(self.msi_translate),
            u8::from(self.power_management),
            u8::from(self.permissive),
            if self.relaxed_rdm {
                "relaxed"
            } else {
                "strict"
            }
        )
    }
}

/// The nodes that a backend has for each device, in the order in which libxl moves them when one before them is removed.
const NODES: [&str; 7] = ["state", "key", "dev", "vdev", "opts", "vdevfn", "name"];

/// Writes the nodes of the `index`th device, up to its state, which tells the backend to take it.
fn write_device(
    store: &mut impl Store,
    index: u32,
    domain: DomId,
    device: PciDevice,
    options: &PciOptions,
) -> Result<(), Error> {
    let backend = backend_path(domain);
    store.write(&format!("{backend}/key-{index}"), device.to_string())?;
    store.write(&format!("{backend}/dev-{index}"), device.to_string())?;
    if let Some(devfn) = options.virtual_devfn {
        store.write(&format!("{backend}/vdevfn-{index}"), format!("{devfn:x}"))?;
    }
    if let Some(name) = &options.name {
        store.write(&format!("{backend}/name-{index}"), name)?;
    }
    store.write(&format!("{backend}/opts-{index}"), options.text())?;
    store.write(
        &format!("{backend}/state-{index}"),
        XenbusState::Initialising.number().to_string(),
    )?;
    store.write(
        &format!("{backend}/num_devs"),
        index.saturating_add(1).to_string(),
    )
}

/// Makes frontend and backend, with their first device.
fn create_backend(
    store: &mut impl Store,
    domain: DomId,
    device: PciDevice,
    options: &PciOptions,
) -> Result<(), Error> {
    let (frontend, backend) = (frontend_path(domain), backend_path(domain));
    let guests = [
        Perm {
            domain,
            access: Access::None,
        },
        Perm {
            domain: DomId::DOM0,
            access: Access::Read,
        },
    ];
    let initialising = XenbusState::Initialising.number().to_string();
    remove_node(store, &frontend)?;
    make_node(store, &frontend, "", &guests)?;
    make_node(
        store,
        &format!("{frontend}/backend"),
        &backend,
        &readable_by(domain),
    )?;
    store.write(&format!("{frontend}/backend-id"), "0")?;
    store.write(&format!("{frontend}/state"), &initialising)?;
    let name = store.read(&format!("/local/domain/{domain}/name"))?;
    make_node(store, &backend, "", &readable_by(domain))?;
    store.write(&format!("{backend}/frontend"), &frontend)?;
    store.write(&format!("{backend}/frontend-id"), domain.to_string())?;
    store.write(&format!("{backend}/online"), "1")?;
    store.write(&format!("{backend}/state"), &initialising)?;
    store.write(&format!("{backend}/domain"), name)?;
    write_device(store, 0, domain, device, options)
}

/// Which of a domain's devices this is.
fn find_device(
    store: &mut impl Store,
    domain: DomId,
    device: PciDevice,
) -> Result<Option<u32>, Error> {
    let backend = backend_path(domain);
    for index in 0..device_count(store, domain)? {
        if store.read(&format!("{backend}/dev-{index}"))? == device.to_string().as_bytes() {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// `num_devs`; 0 without a backend.
fn device_count(store: &mut impl Store, domain: DomId) -> Result<u32, Error> {
    match store.read_u32(&format!("{}/num_devs", backend_path(domain))) {
        Err(error) if error.is_not_found() => Ok(0),
        other => other,
    }
}

/// Removes the nodes of the `removed`th device and moves those of the later ones down. Gives how many devices are left.
fn remove_device(store: &mut impl Store, domain: DomId, removed: u32) -> Result<u32, Error> {
    let backend = backend_path(domain);
    let count = device_count(store, domain)?;
    for node in NODES {
        store.rm(&format!("{backend}/{node}-{removed}"))?;
    }
    for from in removed.saturating_add(1)..count {
        let to = from.saturating_sub(1);
        for node in NODES {
            match store.read(&format!("{backend}/{node}-{from}")) {
                Ok(value) => {
                    store.write(&format!("{backend}/{node}-{to}"), value)?;
                    store.rm(&format!("{backend}/{node}-{from}"))?;
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
    }
    let left = count.saturating_sub(1);
    store.write(&format!("{backend}/num_devs"), left.to_string())?;
    Ok(left)
}

impl Machine {
    /// Gives a device to a domain: with all that `pci = [...]` does for a new one, or as `xl pci-attach` to a running one. The latter waits
    /// for the backend beforehand, and returns before the guest has the device.
    ///
    /// # Errors
    /// [`ToolstackError::Attached`], [`ToolstackError::BackendNotReady`], and what Xen or xenstore say.
    pub fn pci_attach(
        &self,
        domain: DomId,
        device: PciDevice,
        options: &PciOptions,
    ) -> Result<(), ToolstackError> {
        let (kind, starting) = self.alive(domain, "pci-attach", |domain| {
            (domain.kind, !domain.started)
        })?;
        let mut store = self.connect_xenstore()?;
        let owner = format!("{}/domid", info_path(device));
        match store.read_string(&owner) {
            Ok(domain) => return Err(ToolstackError::Attached { device, domain }),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
        store.write(&owner, domain.to_string())?;
        let result = self.give(domain, device).map_err(ToolstackError::from);
        let result = result
            .and_then(|()| self.announce(&mut store, domain, kind, starting, device, options));
        if result.is_err() {
            store.rm(&owner)?;
        }
        result
    }

    /// The hypervisor's part of an attach: reset, line, DMA.
    fn give(&self, domain: DomId, device: PciDevice) -> Result<(), XenError> {
        self.device_owner(device)
            .ok_or_else(|| XenError::from_errno(format!("looking for {device}"), libc::ENODEV))?;
        self.hardware().reset(device);
        let line = self.line_of(device);
        if let Some(gsi) = line {
            self.grant_irq(domain, gsi)?;
        }
        match self.assign_device(domain, device) {
            // libxl lets a PV guest go on without an IOMMU.
            Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => Ok(()),
            Err(error) => {
                // Who is refused the device is not to hear its line.
                let undone = line.map_or(Ok(()), |gsi| self.unmap_pirq(domain, Pirq(gsi.0)));
                undone.and(Err(error))
            }
            Ok(()) => Ok(()),
        }
    }

    /// Gives a domain an interrupt line, whichever device it belongs to: `irqs=` of xl.cfg.
    ///
    /// # Errors
    /// What Xen says.
    pub fn grant_irq(&self, domain: DomId, gsi: Gsi) -> Result<(), XenError> {
        let result = lock(&self.inner.hypervisor).map_line(domain, gsi);
        result.map(drop).map_err(|errno| {
            XenError::from_errno(
                format!("PHYSDEVOP_map_pirq of GSI {gsi} for domain {domain}"),
                errno as i32,
            )
        })
    }

    fn line_of(&self, device: PciDevice) -> Option<Gsi> {
        let hardware = Arc::clone(&self.hardware());
        Registers {
            hardware: &*hardware,
            device,
        }
        .interrupt_line()
        .map(Gsi)
    }

    /// xenstore's part of an attach.
    fn announce(
        &self,
        store: &mut crate::xenstore::Client,
        domain: DomId,
        kind: DomainKind,
        starting: bool,
        device: PciDevice,
        options: &PciOptions,
    ) -> Result<(), ToolstackError> {
        let backend = backend_path(domain);
        if !store.exists(&format!("{backend}/num_devs"))? {
            return Ok(store.transaction(|t| create_backend(t, domain, device, options))?);
        }
        if !starting && kind == DomainKind::Pv {
            self.wait_for_backend(store, domain)?;
        }
        store.transaction(|t| {
            let count = device_count(t, domain)?;
            write_device(t, count, domain, device, options)?;
            if count > 0 && !starting {
                t.write(
                    &format!("{backend}/state"),
                    XenbusState::Reconfiguring.number().to_string(),
                )?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Takes a device from a domain, as `xl pci-detach` does: line, reset and DMA first, then in agreement with backend and guest. Those
    /// who do not answer in time cost the wait, and the device's nodes stay; the device is taken all the same.
    ///
    /// # Errors
    /// [`ToolstackError::NotAttached`], [`ToolstackError::BackendNotReady`], and what Xen or xenstore say.
    pub fn pci_detach(&self, domain: DomId, device: PciDevice) -> Result<(), ToolstackError> {
        let kind = self.alive(domain, "pci-detach", |domain| domain.kind)?;
        let mut store = self.connect_xenstore()?;
        if find_device(&mut store, domain, device)?.is_none() {
            return Err(ToolstackError::NotAttached { device, domain });
        }
        if let Some(gsi) = self.line_of(device)
            && let Err(error) = self.unmap_pirq(domain, Pirq(gsi.0))
        {
            log::debug!("pci-detach: {error}");
        }
        if self.device_owner(device).is_some() {
            self.hardware().reset(device);
        }
        if let Err(error) = self.deassign_device(domain, device) {
            log::debug!("pci-detach: {error}");
        }
        let result = self.withdraw(&mut store, domain, kind, device);
        store.rm(&format!("{}/domid", info_path(device)))?;
        result
    }

    /// xenstore's part of a detach.
    fn withdraw(
        &self,
        store: &mut crate::xenstore::Client,
        domain: DomId,
        kind: DomainKind,
        device: PciDevice,
    ) -> Result<(), ToolstackError> {
        let (frontend, backend) = (frontend_path(domain), backend_path(domain));
        if kind == DomainKind::Pv {
            self.wait_for_backend(store, domain)?;
        }
        let Some(index) = find_device(store, domain, device)? else {
            return Err(ToolstackError::NotAttached { device, domain });
        };
        store.transaction(|t| {
            t.write(
                &format!("{backend}/state-{index}"),
                XenbusState::Closing.number().to_string(),
            )?;
            t.write(
                &format!("{backend}/state"),
                XenbusState::Reconfiguring.number().to_string(),
            )
        })?;
        if kind == DomainKind::Pv {
            self.wait_for_backend(store, domain)?;
        }
        let left = store.transaction(|t| remove_device(t, domain, index))?;
        if left == 0 {
            store.transaction(|t| {
                clean_up(t, &frontend)?;
                clean_up(t, &backend)
            })?;
        }
        Ok(())
    }

    /// The devices that a domain has, as the toolstack sees it: from the backend's nodes.
    ///
    /// # Errors
    /// [`ToolstackError::Xenstore`].
    pub fn pci_list(&self, domain: DomId) -> Result<Vec<PciDevice>, ToolstackError> {
        let mut store = self.connect_xenstore()?;
        let mut devices = Vec::new();
        for index in 0..device_count(&mut store, domain)? {
            let text = store.read_string(&format!("{}/dev-{index}", backend_path(domain)))?;
            devices.extend(text.parse::<PciDevice>());
        }
        Ok(devices)
    }
}
