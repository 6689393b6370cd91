//! PCI devices for the tests of this crate: configuration space as plain bytes, and a memory of what Xen programmed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use super::hardware::{BarSpace, DmaMemory, Hardware, MsiTarget, Window, WindowArea};
use super::lock;
use crate::types::{DomId, Gsi, PciDevice};

/// Offsets of the capabilities that the devices here have.
pub(super) const MSI: usize = 0x50;
pub(super) const MSIX: usize = 0x70;

#[derive(Debug)]
pub(super) struct TestDevice {
    pub config: [u8; 256],
    /// Address and data for each MSI-X entry, and for MSI (`None`).
    pub messages: BTreeMap<Option<u16>, (u64, u32)>,
    pub resets: usize,
    pub physical_function: Option<PciDevice>,
    /// What its BARs decode: BAR 0, of memory, and BAR 1, of ports.
    pub behind: [File; 2],
    /// Lines that its guest has served.
    pub served: Vec<Gsi>,
    /// What its guest may tell that by, if it may.
    pub end_event: Option<Arc<OwnedFd>>,
}

/// Bytes of the memory BAR, of which the second page cannot be mapped.
pub(super) const BAR_SIZE: u64 = 0x3000;
/// And of the one of ports.
pub(super) const PORTS: u64 = 0x20;

/// A bus of such devices.
#[derive(Debug, Default)]
pub(super) struct TestBus {
    devices: Mutex<BTreeMap<PciDevice, TestDevice>>,
    /// What the IOMMU was told: which guest, which devices, and of its memory the addresses and sizes.
    iommu: Mutex<BTreeMap<DomId, Reach>>,
    /// No memory can be mapped any more.
    pub full: AtomicBool,
    /// No memory can be unmapped.
    pub stuck: AtomicBool,
    /// No interrupt can be programmed any more.
    pub out_of_vectors: AtomicBool,
    /// An access to a window waits here twice before it is done, and so does memory that is mapped.
    pub pause: Mutex<Option<Arc<Barrier>>>,
}

/// What a guest's devices reach.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Reach {
    pub devices: BTreeSet<PciDevice>,
    pub memory: BTreeMap<u64, u64>,
}

/// Bus 3's device of that number.
pub(super) fn address(number: u8) -> PciDevice {
    PciDevice {
        segment: 0,
        bus: 3,
        devfn: number << 3,
    }
}

/// Where a device's memory BAR is.
pub(super) fn bar_address(device: PciDevice) -> u32 {
    0xfe00_0000 + (u32::from(device.devfn) << 16)
}

/// Where its ports are.
pub(super) fn first_port(device: PciDevice) -> u32 {
    0xc000 + u32::from(device.devfn) * 0x20
}

impl TestBus {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds a network card with decode on, MSI with 4 vectors, an MSI-X table of 8 entries, and INTA on line 17.
    pub fn add(&self, device: PciDevice) {
        let mut config = [0; 256];
        config[0x00..0x04].copy_from_slice(&[0x86, 0x80, 0xd3, 0x10]);
        config[0x04] = 0x03;
        config[0x06] = 0x10;
        config[0x0b] = 0x02;
        config[0x10..0x14].copy_from_slice(&bar_address(device).to_le_bytes());
        config[0x14..0x18].copy_from_slice(&(first_port(device) | 1).to_le_bytes());
        config[0x34] = 0x50;
        config[0x3c] = 17;
        config[0x3d] = 1;
        config[MSI..MSI + 4].copy_from_slice(&[0x05, 0x70, 0x84, 0x00]);
        config[MSIX..MSIX + 4].copy_from_slice(&[0x11, 0x00, 0x07, 0x00]);
        config[MSIX + 4..MSIX + 8].copy_from_slice(&0x0000_3000u32.to_le_bytes());
        let behind = [BAR_SIZE, PORTS].map(|size| {
            let file = tempfile::tempfile().expect("the tests have room");
            file.set_len(size).expect("the tests have room");
            file
        });
        let new = TestDevice {
            config,
            messages: BTreeMap::new(),
            resets: 0,
            physical_function: None,
            behind,
            served: Vec::new(),
            end_event: None,
        };
        lock(&self.devices).insert(device, new);
    }

    pub fn remove(&self, device: PciDevice) {
        lock(&self.devices).remove(&device);
    }

    /// What a guest's devices reach; `None` when it has no device.
    pub fn reach(&self, domain: DomId) -> Option<Reach> {
        lock(&self.iommu).get(&domain).cloned()
    }

    fn check_room(&self) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) {
            Err(io::Error::from_raw_os_error(libc::ENOMEM))
        } else {
            Ok(())
        }
    }

    /// Waits where the test wants it.
    fn pause(&self) {
        let pause = lock(&self.pause).clone();
        if let Some(pause) = pause {
            pause.wait();
            pause.wait();
        }
    }

    /// Waits where the test wants it, and does an access if the device is the guest's then.
    fn access<T>(
        &self,
        domain: DomId,
        device: PciDevice,
        bar: u8,
        access: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<T> {
        self.pause();
        let iommu = lock(&self.iommu);
        let reach = iommu.get(&domain);
        if !reach.is_some_and(|reach| reach.devices.contains(&device)) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        self.with(device, |found| access(&found.behind[usize::from(bar)]))
    }

    /// Looks at or changes a device.
    pub fn with<T>(&self, device: PciDevice, body: impl FnOnce(&mut TestDevice) -> T) -> T {
        body(
            lock(&self.devices)
                .get_mut(&device)
                .expect("the test has added it"),
        )
    }
}

impl Hardware for TestBus {
    fn config_read(&self, device: PciDevice, offset: u16, width: u8) -> u32 {
        let devices = lock(&self.devices);
        let Some(found) = devices.get(&device) else {
            return u32::MAX >> (32 - 8 * u32::from(width));
        };
        let mut bytes = [0; 4];
        let (offset, width) = (usize::from(offset), usize::from(width));
        bytes[..width].copy_from_slice(&found.config[offset..offset + width]);
        u32::from_le_bytes(bytes)
    }

    fn config_write(&self, device: PciDevice, offset: u16, width: u8, value: u32) {
        let (offset, width) = (usize::from(offset), usize::from(width));
        self.with(device, |found| {
            found.config[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width])
        });
    }

    fn program_msi(&self, device: PciDevice, target: MsiTarget) -> io::Result<()> {
        if self.out_of_vectors.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.with(device, |found| {
            found
                .messages
                .insert(target.entry, (target.address, target.data))
        });
        Ok(())
    }

    fn clear_msi(&self, device: PciDevice, entry: Option<u16>) {
        if let Some(found) = lock(&self.devices).get_mut(&device) {
            found.messages.remove(&entry);
        }
    }

    fn physical_function(&self, device: PciDevice) -> Option<PciDevice> {
        lock(&self.devices)
            .get(&device)
            .and_then(|found| found.physical_function)
    }

    fn reset(&self, device: PciDevice) {
        self.with(device, |found| {
            found.resets += 1;
            found.messages.clear();
        });
    }

    fn assign(&self, domain: DomId, device: PciDevice, memory: &[DmaMemory]) -> io::Result<()> {
        self.check_room()?;
        let mut iommu = lock(&self.iommu);
        let reach = iommu.entry(domain).or_default();
        assert!(reach.devices.insert(device), "assigned twice: {device}");
        reach.memory = memory
            .iter()
            .map(|memory| (memory.address, memory.size))
            .collect();
        Ok(())
    }

    fn deassign(&self, domain: DomId, device: PciDevice) {
        let mut iommu = lock(&self.iommu);
        let reach = iommu.get_mut(&domain).expect("it has a device");
        assert!(reach.devices.remove(&device), "not assigned: {device}");
        if reach.devices.is_empty() {
            iommu.remove(&domain);
        }
    }

    fn map_dma(&self, domain: DomId, memory: &DmaMemory) -> io::Result<()> {
        self.pause();
        self.check_room()?;
        let mut iommu = lock(&self.iommu);
        let reach = iommu.get_mut(&domain).expect("it has a device");
        assert_eq!(reach.memory.insert(memory.address, memory.size), None);
        Ok(())
    }

    fn unmap_dma(&self, domain: DomId, address: u64) -> io::Result<()> {
        if self.stuck.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut iommu = lock(&self.iommu);
        let reach = iommu.get_mut(&domain).expect("it has a device");
        assert!(reach.memory.remove(&address).is_some());
        Ok(())
    }

    fn end_of_interrupt(&self, domain: DomId, gsi: Gsi) {
        for device in self.reach(domain).unwrap_or_default().devices {
            self.with(device, |found| found.served.push(gsi));
        }
    }

    fn end_event(&self, domain: DomId, _gsi: Gsi) -> io::Result<OwnedFd> {
        let mut devices = self.reach(domain).unwrap_or_default().devices.into_iter();
        let offered = devices.find_map(|device| self.with(device, |found| found.end_event.clone()));
        let event = offered.ok_or_else(|| io::Error::from_raw_os_error(libc::EOPNOTSUPP))?;
        event.try_clone()
    }

    fn windows(&self, device: PciDevice) -> Vec<Window> {
        let register = |offset| self.config_read(device, offset, 4);
        vec![
            Window {
                bar: 0,
                space: BarSpace::Memory,
                address: register(0x10).into(),
                size: BAR_SIZE,
            },
            Window {
                bar: 1,
                space: BarSpace::Io,
                address: (register(0x14) & !0b11).into(),
                size: PORTS,
            },
        ]
    }

    fn areas(&self, domain: DomId, device: PciDevice, bar: u8) -> io::Result<Vec<WindowArea>> {
        assert_eq!(bar, 0);
        let area = |start| {
            let file = self.access(domain, device, bar, File::try_clone)?;
            Ok(WindowArea {
                start,
                size: 0x1000,
                file: file.into(),
                offset: start,
            })
        };
        [0, 0x2000].into_iter().map(area).collect()
    }

    fn window_read(
        &self,
        domain: DomId,
        device: PciDevice,
        bar: u8,
        offset: u64,
        width: u8,
    ) -> io::Result<u64> {
        let mut bytes = [0; 8];
        let part = &mut bytes[..width.into()];
        self.access(domain, device, bar, |file| file.read_exact_at(part, offset))?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn window_write(
        &self,
        domain: DomId,
        device: PciDevice,
        bar: u8,
        offset: u64,
        width: u8,
        value: u64,
    ) -> io::Result<()> {
        let bytes = value.to_le_bytes();
        let part = &bytes[..width.into()];
        self.access(domain, device, bar, |file| file.write_all_at(part, offset))
    }
}
