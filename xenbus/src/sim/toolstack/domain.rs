//! Domains come and go.

use nix::errno::Errno;

use super::ToolstackError;
use crate::platform::{Xen, XenError};
use crate::sim::{DomainKind, Machine, lock};
use crate::types::DomId;
use crate::xenstore::wire::MessageType;
use crate::xenstore::{Access, Error, Perm, Store};

/// Nodes of a domain that it may read.
const READ_ONLY: [&str; 4] = ["cpu", "memory", "device", "control"];
/// Nodes of a domain that are its own.
const OWN: [&str; 8] = [
    "control/shutdown",
    "control/feature-poweroff",
    "control/sysrq",
    "data",
    "drivers",
    "feature",
    "attr",
    "error",
];

pub(super) fn perm(domain: DomId, access: Access) -> Perm {
    Perm { domain, access }
}

/// dom0's, and `domain` may read.
pub(super) fn readable_by(domain: DomId) -> [Perm; 2] {
    [perm(DomId::DOM0, Access::None), perm(domain, Access::Read)]
}

/// A node with permissions of its own.
pub(super) fn make_node(
    store: &mut impl Store,
    path: &str,
    value: &str,
    perms: &[Perm],
) -> Result<(), Error> {
    store.write(path, value)?;
    store.set_perms(path, perms)
}

/// Removes a node, if it is there.
pub(super) fn remove_node(store: &mut impl Store, path: &str) -> Result<(), Error> {
    match store.rm(path) {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

/// Removes a node, and those above it that have neither value nor children then (libxl's `libxl__xs_path_cleanup`).
pub(super) fn clean_up(store: &mut impl Store, path: &str) -> Result<(), Error> {
    remove_node(store, path)?;
    let mut path = path;
    while let Some((parent, _)) = path
        .rsplit_once('/')
        .filter(|(parent, _)| !parent.is_empty())
    {
        let idle = match store.read(parent) {
            Ok(value) => value.is_empty() && store.directory(parent)?.is_empty(),
            Err(error) if error.is_not_found() => false,
            Err(error) => return Err(error),
        };
        if !idle {
            break;
        }
        store.rm(parent)?;
        path = parent;
    }
    Ok(())
}

fn vm_path(domain: DomId) -> String {
    format!("/vm/00000000-0000-0000-0000-{:012x}", domain.0)
}

impl Machine {
    /// Makes a domain, its directory in xenstore included, and introduces it to xenstored. It is paused: what is attached now, it will have
    /// when it starts.
    ///
    /// # Errors
    /// [`ToolstackError::Xen`], [`ToolstackError::Xenstore`].
    pub fn create_domain(&self, name: &str, kind: DomainKind) -> Result<DomId, ToolstackError> {
        let created = lock(&self.inner.hypervisor).create(kind);
        let domain = created
            .map_err(|errno| XenError::from_errno("XEN_DOMCTL_createdomain", errno as i32))?;
        let home = format!("/local/domain/{domain}");
        let mut store = self.connect_xenstore()?;
        store.transaction(|t| {
            let readable = readable_by(domain);
            remove_node(t, &home)?;
            make_node(t, &home, "", &readable)?;
            make_node(t, &vm_path(domain), "", &readable)?;
            make_node(
                t,
                &format!("/libxl/{domain}"),
                "",
                &[perm(DomId::DOM0, Access::None)],
            )?;
            for node in READ_ONLY {
                make_node(t, &format!("{home}/{node}"), "", &readable)?;
            }
            for node in OWN {
                make_node(
                    t,
                    &format!("{home}/{node}"),
                    "",
                    &[perm(domain, Access::None)],
                )?;
            }
            t.write(&format!("{home}/vm"), vm_path(domain))?;
            t.write(&format!("{home}/name"), name)?;
            t.write(&format!("{}/name", vm_path(domain)), name)?;
            t.write(&format!("{home}/domid"), domain.to_string())
        })?;
        // Page and port of a ring that nobody uses: in here guests connect by themselves.
        store.request(
            MessageType::Introduce,
            &domain.to_string(),
            &[b"0\0", b"1\0"],
        )?;
        Ok(domain)
    }

    /// Lets a new domain run. From now on devices are attached to a running guest.
    ///
    /// # Errors
    /// [`ToolstackError::Xen`]: ESRCH.
    pub fn unpause_domain(&self, domain: DomId) -> Result<(), ToolstackError> {
        self.alive(domain, "XEN_DOMCTL_unpausedomain", |domain| {
            domain.started = true;
            domain.paused = false;
        })
    }

    /// Has a domain that runs pause, as `xl pause` does: what Xen tells of it. Its CPUs are the test's to stop.
    ///
    /// # Errors
    /// [`ToolstackError::Xen`]: ESRCH.
    pub fn pause_domain(&self, domain: DomId) -> Result<(), ToolstackError> {
        self.alive(domain, "XEN_DOMCTL_pausedomain", |domain| {
            domain.paused = true;
        })
    }

    pub(super) fn alive<T>(
        &self,
        domain: DomId,
        operation: &str,
        body: impl FnOnce(&mut crate::sim::hypervisor::Domain) -> T,
    ) -> Result<T, ToolstackError> {
        let mut hypervisor = lock(&self.inner.hypervisor);
        let result = hypervisor.alive(domain).map(body);
        Ok(result.map_err(|errno| {
            XenError::from_errno(format!("{operation} for domain {domain}"), errno as i32)
        })?)
    }

    /// Asks a guest to shut down, as `xl shutdown` does. The guest does the rest.
    ///
    /// # Errors
    /// [`ToolstackError::Xenstore`].
    pub fn request_shutdown(&self, domain: DomId) -> Result<(), ToolstackError> {
        Ok(self.connect_xenstore()?.write(
            &format!("/local/domain/{domain}/control/shutdown"),
            "poweroff",
        )?)
    }

    /// A guest has shut down, or crashed: its own `SCHEDOP_shutdown`. Xen tells xenstored, which tells all who watch `@releaseDomain`.
    ///
    /// # Errors
    /// ESRCH.
    pub fn domain_shut_down(&self, domain: DomId) -> Result<(), XenError> {
        let result = lock(&self.inner.hypervisor)
            .alive(domain)
            .map(|domain| domain.shut_down = true);
        result.map_err(|errno: Errno| {
            XenError::from_errno(format!("SCHEDOP_shutdown of domain {domain}"), errno as i32)
        })?;
        self.inner.xenstored.domain_released();
        Ok(())
    }

    /// Destroys a domain, as `xl destroy` does and xl's daemon after a shutdown: takes its devices first, each with all waits, then removes
    /// its nodes, then the domain. Devices that could not be taken in an orderly way are taken all the same.
    ///
    /// # Errors
    /// [`ToolstackError::Xenstore`]; [`ToolstackError::Xen`] when there is no such domain.
    pub fn destroy_domain(&self, domain: DomId) -> Result<(), ToolstackError> {
        self.alive(domain, "XEN_DOMCTL_getdomaininfo", |_| ())?;
        for device in self.pci_list(domain)? {
            if let Err(error) = self.pci_detach(domain, device) {
                log::info!("destroying domain {domain}: {error}");
            }
        }
        self.virtio_disks_destroy(domain)?;
        let mut store = self.connect_xenstore()?;
        for path in [
            format!("/local/domain/{domain}"),
            vm_path(domain),
            format!("/libxl/{domain}"),
        ] {
            remove_node(&mut store, &path)?;
        }
        let result = self.destroy(domain);
        result.map_err(|errno| {
            XenError::from_errno(
                format!("XEN_DOMCTL_destroydomain for domain {domain}"),
                errno as i32,
            )
        })?;
        self.inner.xenstored.domain_destroyed(domain);
        Ok(())
    }
}
