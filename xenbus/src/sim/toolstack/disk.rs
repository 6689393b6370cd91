//! Virtio disks, of `disk = [ "...,backendtype=standalone,specification=virtio" ]`, as libxl 4.17 hands them to whoever
//! serves them.

use std::time::Instant;

use super::domain::{clean_up, make_node, perm, readable_by};
use super::{Machine, PAUSE, ToolstackError};
use crate::platform::Xen;
use crate::state::XenbusState;
use crate::types::DomId;
use crate::xenstore::{Access, Client, Store};

/// A disk's line in the guest's configuration.
#[derive(Debug, Clone)]
pub struct VirtioDisk {
    /// Its name among the guest's disks: `xvde`.
    pub vdev: String,
    /// Its number: 51776 for `xvde`.
    pub device: u32,
    /// Path of its image.
    pub path: String,
    /// `ro`, and not `rw`.
    pub read_only: bool,
}

fn backend_path(domain: DomId, device: u32) -> String {
    format!("/local/domain/0/backend/virtio_disk/{domain}/{device}")
}

fn frontend_path(domain: DomId, device: u32) -> String {
    format!("/local/domain/{domain}/device/virtio_disk/{device}")
}

impl Machine {
    /// Describes a disk to its backend, and waits until that is ready (state 2), for as long as the toolstack's patience lasts; not when the
    /// state vanishes.
    ///
    /// # Errors
    /// [`ToolstackError::DiskNotReady`], [`ToolstackError::Xenstore`].
    pub fn virtio_disk_add(&self, domain: DomId, disk: &VirtioDisk) -> Result<(), ToolstackError> {
        let VirtioDisk {
            vdev, device, path, ..
        } = disk;
        let (backend, frontend) = (
            backend_path(domain, *device),
            frontend_path(domain, *device),
        );
        let mode = if disk.read_only { "r" } else { "w" };
        let id = domain.to_string();
        let nodes = [
            ("frontend", frontend.as_str()),
            ("params", path),
            ("frontend-id", &id),
            ("online", "1"),
            ("removable", "0"),
            ("bootable", "1"),
            ("state", "1"),
            ("dev", vdev),
            ("type", "standalone"),
            ("mode", mode),
            ("device-type", "disk"),
            ("discard-enable", if disk.read_only { "0" } else { "1" }),
            ("specification", "virtio"),
            ("transport", "mmio"),
            ("base", "0"),
            ("irq", "0"),
        ];
        let mut store = self.connect_xenstore()?;
        store.transaction(|t| {
            make_node(t, &backend, "", &readable_by(domain))?;
            for (node, value) in nodes {
                t.write(&format!("{backend}/{node}"), value)?;
            }
            let perms = [perm(domain, Access::None), perm(DomId::DOM0, Access::Read)];
            make_node(t, &frontend, "", &perms)?;
            t.write(&format!("{frontend}/backend"), &backend)?;
            t.write(&format!("{frontend}/backend-id"), "0")?;
            t.write(&format!("{frontend}/state"), "1")
        })?;
        self.wait_for_disk(&mut store, domain, *device, XenbusState::InitWait)
    }

    /// Takes a disk from a guest: asks the backend to close, waits for it, and removes the nodes.
    ///
    /// # Errors
    /// [`ToolstackError::DiskNotReady`], and the nodes are left; [`ToolstackError::Xenstore`].
    pub fn virtio_disk_remove(&self, domain: DomId, device: u32) -> Result<(), ToolstackError> {
        let backend = backend_path(domain, device);
        let mut store = self.connect_xenstore()?;
        let state = store.read_state(&format!("{backend}/state"))?;
        if state != XenbusState::Unknown {
            store.transaction(|t| {
                t.write(&format!("{backend}/online"), "0")?;
                t.write(&format!("{backend}/state"), "5")
            })?;
            self.wait_for_disk(&mut store, domain, device, XenbusState::Closed)?;
        }
        clean_up(&mut store, &frontend_path(domain, device))?;
        Ok(clean_up(&mut store, &backend)?)
    }

    /// Takes all of them, as when their guest is destroyed: backends that do not close lose their nodes all the same.
    pub(super) fn virtio_disks_destroy(&self, domain: DomId) -> Result<(), ToolstackError> {
        let mut store = self.connect_xenstore()?;
        let disks = match store.directory(&format!("/local/domain/0/backend/virtio_disk/{domain}"))
        {
            Err(error) if error.is_not_found() => return Ok(()),
            disks => disks?,
        };
        for device in disks.iter().filter_map(|device| device.parse().ok()) {
            if let Err(error) = self.virtio_disk_remove(domain, device) {
                log::info!("destroying domain {domain}: {error}");
                clean_up(&mut store, &backend_path(domain, device))?;
            }
        }
        Ok(())
    }

    fn wait_for_disk(
        &self,
        store: &mut Client,
        domain: DomId,
        device: u32,
        wanted: XenbusState,
    ) -> Result<(), ToolstackError> {
        let path = format!("{}/state", backend_path(domain, device));
        let start = Instant::now();
        loop {
            let state = store.read_state(&path)?;
            let waited = start.elapsed();
            if state == wanted {
                return Ok(());
            }
            if state == XenbusState::Unknown || waited >= self.inner.toolstack_timeout {
                return Err(ToolstackError::DiskNotReady {
                    domain,
                    device,
                    state,
                    wanted,
                    waited,
                });
            }
            std::thread::sleep(PAUSE);
        }
    }
}
