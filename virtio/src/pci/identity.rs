//! What a function says that it is (virtio 1.3, sections 4.1.2 and 5).

use conf_space::emulated::Identity;

use super::layout::Mode;
use crate::device::DeviceKind;

/// The vendor number of all virtio devices.
const VENDOR: u16 = 0x1af4;
/// Device numbers of modern functions: this and the device type.
const MODERN: u16 = 0x1040;
/// Subsystem number of a modern function: not a device type (section 4.1.2.1).
const MODERN_SUBSYSTEM: u16 = 0x1100;

/// Base class, sub-class, programming interface (PCI Code and ID Assignment Specification 1.15,
/// section 1).
const fn class(kind: DeviceKind) -> [u8; 3] {
    match kind {
        // Ethernet controller
        DeviceKind::Net => [0x02, 0x00, 0x00],
        // Mass storage, SCSI: what other hypervisors say, and firmware looks for
        DeviceKind::Block => [0x01, 0x00, 0x00],
        // Other communications device
        DeviceKind::Console => [0x07, 0x80, 0x00],
        // Does not fit in any defined class
        DeviceKind::Entropy => [0xff, 0x00, 0x00],
    }
}

/// Device numbers of functions with a legacy interface.
const fn transitional(kind: DeviceKind) -> u16 {
    match kind {
        DeviceKind::Net => 0x1000,
        DeviceKind::Block => 0x1001,
        DeviceKind::Console => 0x1003,
        DeviceKind::Entropy => 0x1005,
    }
}

pub(super) const fn of(kind: DeviceKind, mode: Mode) -> Identity {
    let (device, subsystem, revision) = if mode.has_legacy() {
        (transitional(kind), kind.id(), 0)
    } else {
        (MODERN.wrapping_add(kind.id()), MODERN_SUBSYSTEM, 1)
    };
    Identity {
        vendor: VENDOR,
        device,
        subsystem_vendor: VENDOR,
        subsystem,
        class: class(kind),
        revision,
    }
}
