//! `PHYSDEVOP_*`: interrupts and PCI devices (Xen `physdev.h`, a stable interface).

use std::io;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Privcmd;
use crate::platform::{MsiRequest, XenError};
use crate::types::{DomId, PciDevice, Pirq};

const MAP_PIRQ: u32 = 13;
const UNMAP_PIRQ: u32 = 14;
const RESTORE_MSI_EXT: u32 = 27;
const PREPARE_MSIX: u32 = 30;
const RELEASE_MSIX: u32 = 31;

const MAP_PIRQ_TYPE_MSI: i32 = 0;
const MAP_PIRQ_TYPE_MSI_SEG: i32 = 3;
const MAP_PIRQ_TYPE_MULTI_MSI: i32 = 4;

/// "Any" for `index` and `pirq`.
const ANY: i32 = -1;

/// `struct physdev_map_pirq`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct MapPirq {
    domid: u16,
    pad0: u16,
    kind: i32,
    index: i32,
    /// In: [`ANY`]. Out: the PIRQ.
    pirq: i32,
    /// Bus in bits 7:0; PCI segment in bits 31:16 for MSI_SEG and MULTI_MSI.
    bus: i32,
    devfn: i32,
    /// The MSI-X entry, or for MULTI_MSI the number of vectors.
    entry_nr: i32,
    pad1: u32,
    /// For MSI-X the address of the BAR with the table, 0 for MSI.
    table_base: u64,
}

/// `struct physdev_unmap_pirq`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct UnmapPirq {
    domid: u16,
    pad: u16,
    pirq: u32,
}

/// `struct physdev_pci_device`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct PhysdevPciDevice {
    seg: u16,
    bus: u8,
    devfn: u8,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<MapPirq>() == 40);
    assert!(
        offset_of!(MapPirq, kind) == 4
            && offset_of!(MapPirq, index) == 8
            && offset_of!(MapPirq, pirq) == 12
    );
    assert!(
        offset_of!(MapPirq, bus) == 16
            && offset_of!(MapPirq, devfn) == 20
            && offset_of!(MapPirq, entry_nr) == 24
    );
    assert!(offset_of!(MapPirq, table_base) == 32);
    assert!(size_of::<UnmapPirq>() == 8 && offset_of!(UnmapPirq, pirq) == 4);
    assert!(size_of::<PhysdevPciDevice>() == 4);
    assert!(offset_of!(PhysdevPciDevice, bus) == 2 && offset_of!(PhysdevPciDevice, devfn) == 3);
};

impl MapPirq {
    fn new(domain: DomId, device: PciDevice, request: MsiRequest) -> Self {
        let (kind, entry_nr, table_base) = match request {
            MsiRequest::Msi => (MAP_PIRQ_TYPE_MSI_SEG, 0, 0),
            MsiRequest::MultiMsi { count } => (MAP_PIRQ_TYPE_MULTI_MSI, count.into(), 0),
            MsiRequest::MsiX { entry, table_base } => {
                (MAP_PIRQ_TYPE_MSI_SEG, entry.into(), table_base)
            }
        };
        let bus = u32::from(device.segment) << 16 | u32::from(device.bus);
        Self {
            domid: domain.0,
            pad0: 0,
            kind,
            index: ANY,
            pirq: ANY,
            bus: bus.cast_signed(),
            devfn: device.devfn.into(),
            entry_nr,
            pad1: 0,
            table_base,
        }
    }
}

impl From<PciDevice> for PhysdevPciDevice {
    fn from(device: PciDevice) -> Self {
        Self {
            seg: device.segment,
            bus: device.bus,
            devfn: device.devfn,
        }
    }
}

impl Privcmd {
    pub(crate) fn map_msi(
        &self,
        domain: DomId,
        device: PciDevice,
        request: MsiRequest,
    ) -> Result<Pirq, XenError> {
        let operation = || format!("PHYSDEVOP_map_pirq ({request}) for domain {domain}, {device}");
        let mut map = MapPirq::new(domain, device, request);
        let mut result = self.physdev_op(MAP_PIRQ, &map);
        // A Xen older than the segment's place in `bus` does not know that type.
        if map.kind == MAP_PIRQ_TYPE_MSI_SEG
            && device.segment == 0
            && has_errno(&result, libc::EINVAL)
        {
            map.kind = MAP_PIRQ_TYPE_MSI;
            result = self.physdev_op(MAP_PIRQ, &map);
        }
        let mapped = result.map_err(|source| XenError::Failed {
            operation: operation(),
            source,
        })?;
        u32::try_from(mapped.pirq)
            .map(Pirq)
            .map_err(|_| XenError::from_errno(operation(), libc::EIO))
    }

    pub(crate) fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<(), XenError> {
        let unmap = UnmapPirq {
            domid: domain.0,
            pad: 0,
            pirq: pirq.0,
        };
        self.physdev_op(UNMAP_PIRQ, &unmap)
            .map(drop)
            .map_err(|source| XenError::Failed {
                operation: format!("PHYSDEVOP_unmap_pirq of PIRQ {pirq} of domain {domain}"),
                source,
            })
    }

    pub(crate) fn prepare_msix(&self, device: PciDevice) -> Result<(), XenError> {
        let result = self.physdev_op(PREPARE_MSIX, &PhysdevPciDevice::from(device));
        if has_errno(&result, libc::EBUSY) || has_errno(&result, libc::EEXIST) {
            return Ok(()); // prepared already
        }
        device_result("PHYSDEVOP_prepare_msix", device, result)
    }

    pub(crate) fn release_msix(&self, device: PciDevice) -> Result<(), XenError> {
        device_result(
            "PHYSDEVOP_release_msix",
            device,
            self.physdev_op(RELEASE_MSIX, &PhysdevPciDevice::from(device)),
        )
    }

    pub(crate) fn restore_msi(&self, device: PciDevice) -> Result<(), XenError> {
        device_result(
            "PHYSDEVOP_restore_msi_ext",
            device,
            self.physdev_op(RESTORE_MSI_EXT, &PhysdevPciDevice::from(device)),
        )
    }
}

fn has_errno<T>(result: &io::Result<T>, errno: i32) -> bool {
    result
        .as_ref()
        .is_err_and(|error| error.raw_os_error() == Some(errno))
}

fn device_result<T>(name: &str, device: PciDevice, result: io::Result<T>) -> Result<(), XenError> {
    result.map(drop).map_err(|source| XenError::Failed {
        operation: format!("{name} for {device}"),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: PciDevice = PciDevice {
        segment: 0x8001,
        bus: 0x81,
        devfn: 0x2a,
    };

    #[test]
    fn an_msix_entry_is_asked_for_by_number_and_bar() {
        let map = MapPirq::new(
            DomId(7),
            DEVICE,
            MsiRequest::MsiX {
                entry: 5,
                table_base: 0xfebc_0000,
            },
        );
        assert_eq!(
            (map.domid, map.kind, map.index, map.pirq),
            (7, MAP_PIRQ_TYPE_MSI_SEG, -1, -1)
        );
        assert_eq!((map.bus.cast_unsigned(), map.devfn), (0x8001_0081, 0x2a));
        assert_eq!((map.entry_nr, map.table_base), (5, 0xfebc_0000));
    }

    #[test]
    fn msi_has_no_table_and_several_vectors_are_a_type_of_their_own() {
        let one = MapPirq::new(DomId(7), DEVICE, MsiRequest::Msi);
        assert_eq!(
            (one.kind, one.entry_nr, one.table_base),
            (MAP_PIRQ_TYPE_MSI_SEG, 0, 0)
        );
        let four = MapPirq::new(DomId(7), DEVICE, MsiRequest::MultiMsi { count: 4 });
        assert_eq!(
            (four.kind, four.entry_nr, four.table_base),
            (MAP_PIRQ_TYPE_MULTI_MSI, 4, 0)
        );
    }
}
