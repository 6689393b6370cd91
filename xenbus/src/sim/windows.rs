//! Devices' memory and I/O ports for guests: a guest may reach what the BARs of its own devices decode, as the toolstack grants it (libxl by
//! `xc_domain_iomem_permission` and `xc_domain_ioport_permission`), by the addresses that it reads there.

use std::io;

use nix::errno::Errno;

use super::guest::WindowAccess;
use super::hardware::{BarSpace, Window, WindowArea};
use super::{Machine, lock};
use crate::platform::XenError;
use crate::types::{DomId, PciDevice};

/// A window of a device, open to the guest whose device it is.
#[derive(Debug, Clone)]
pub(super) struct OpenWindow {
    machine: Machine,
    domain: DomId,
    device: PciDevice,
    pub window: Window,
}

impl Machine {
    fn devices_of(&self, domain: DomId) -> Vec<PciDevice> {
        let hypervisor = lock(&self.inner.hypervisor);
        let devices = hypervisor.devices.iter();
        devices
            .filter(|(_, record)| record.owner == domain)
            .map(|(device, _)| *device)
            .collect()
    }

    /// The window of a guest's device that an address lies in.
    ///
    /// # Errors
    /// ESRCH; EPERM when no device of this guest decodes the address.
    pub(super) fn open_window(
        &self,
        domain: DomId,
        space: BarSpace,
        address: u64,
    ) -> Result<OpenWindow, XenError> {
        self.check_alive(domain)?;
        let hardware = self.hardware();
        let has = |window: &Window| {
            let within = address.checked_sub(window.address);
            window.space == space && within.is_some_and(|offset| offset < window.size)
        };
        let found = self.devices_of(domain).into_iter().find_map(|device| {
            let window = hardware.windows(device).into_iter().find(has)?;
            Some(OpenWindow {
                machine: self.clone(),
                domain,
                device,
                window,
            })
        });
        found.ok_or_else(|| {
            let operation = format!("{} for domain {domain}", opening(space, address));
            XenError::from_errno(operation, libc::EPERM)
        })
    }
}

/// What was tried when a window cannot be opened.
pub(super) fn opening(space: BarSpace, address: u64) -> String {
    let what = match space {
        BarSpace::Memory => "device memory",
        BarSpace::Io => "a device's I/O ports",
    };
    format!("opening {what} at {address:#x}")
}

impl OpenWindow {
    /// What of it the guest may map: nothing, unless the machine was started so.
    pub fn areas(&self) -> io::Result<Vec<WindowArea>> {
        let map = lock(&self.machine.inner.hypervisor).options.map_windows;
        if !map || self.window.space == BarSpace::Io {
            return Ok(Vec::new());
        }
        let hardware = self.machine.hardware();
        hardware.areas(self.domain, self.device, self.window.bar)
    }

    /// Whether both are of the same BAR at the same place.
    pub fn is_same(&self, other: &Self) -> bool {
        (self.domain, self.device, self.window) == (other.domain, other.device, other.window)
    }

    /// That it is an access within the window. Whether the device is the guest's still, the hardware looks up with the access.
    fn check(&self, offset: u64, width: u8) -> io::Result<()> {
        let size = u64::from(width);
        let fits = self.window.space.widths().contains(&width)
            && offset.is_multiple_of(size)
            && offset
                .checked_add(size)
                .is_some_and(|end| end <= self.window.size);
        if fits {
            Ok(())
        } else {
            Err(Errno::EINVAL.into())
        }
    }
}

impl WindowAccess for OpenWindow {
    fn read(&self, offset: u64, width: u8) -> io::Result<u64> {
        self.check(offset, width)?;
        let hardware = self.machine.hardware();
        hardware.window_read(self.domain, self.device, self.window.bar, offset, width)
    }

    fn write(&self, offset: u64, width: u8, value: u64) -> io::Result<()> {
        self.check(offset, width)?;
        let hardware = self.machine.hardware();
        let bar = self.window.bar;
        hardware.window_write(self.domain, self.device, bar, offset, width, value)
    }
}
