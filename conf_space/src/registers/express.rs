//! The PCI Express capability of an endpoint (PCI Express Base Specification 6.0, section 7.5.3).
//! The registers of ports are named, their bits read-only.

use super::{Block, Register, bits, capability as start};
use crate::access::Width::{Four, Two};

/// PCI Express capabilities: bits in [`capabilities`].
pub const CAPABILITIES: Register =
    Register::new("PCI Express Capabilities", 0x02, Two, "PCIe 7.5.3.2");
/// Device capabilities.
pub const DEVICE_CAPABILITIES: Register =
    Register::new("Device Capabilities", 0x04, Four, "PCIe 7.5.3.3");
/// Device control.
pub const DEVICE_CONTROL: Register = Register::new("Device Control", 0x08, Two, "PCIe 7.5.3.4")
    .rw(0xffff)
    .fields(&[
        bits("Correctable Error Reporting Enable", 1 << 0),
        bits("Non-Fatal Error Reporting Enable", 1 << 1),
        bits("Fatal Error Reporting Enable", 1 << 2),
        bits("Unsupported Request Reporting Enable", 1 << 3),
        bits("Enable Relaxed Ordering", 1 << 4),
        bits("Max Payload Size", 7 << 5),
        bits("Extended Tag Enable", 1 << 8),
        bits("Phantom Functions Enable", 1 << 9),
        bits("Aux Power PM Enable", 1 << 10),
        bits("Enable No Snoop", 1 << 11),
        bits("Max Read Request Size", 7 << 12),
        bits("Initiate Function Level Reset", 1 << 15),
    ]);
/// Device status.
pub const DEVICE_STATUS: Register = Register::new("Device Status", 0x0a, Two, "PCIe 7.5.3.5")
    .rw1c(0x004f)
    .raz(0xff80)
    .fields(&[
        bits("Correctable Error Detected", 1 << 0),
        bits("Non-Fatal Error Detected", 1 << 1),
        bits("Fatal Error Detected", 1 << 2),
        bits("Unsupported Request Detected", 1 << 3),
        bits("AUX Power Detected", 1 << 4),
        bits("Transactions Pending", 1 << 5),
    ]);
/// Link capabilities.
pub const LINK_CAPABILITIES: Register =
    Register::new("Link Capabilities", 0x0c, Four, "PCIe 7.5.3.6");
/// Link control.
pub const LINK_CONTROL: Register = Register::new("Link Control", 0x10, Two, "PCIe 7.5.3.7")
    .rw(0x03cb)
    .fields(&[
        bits("ASPM Control", 3),
        bits("Read Completion Boundary", 1 << 3),
        bits("Link Disable", 1 << 4),
        bits("Retrain Link", 1 << 5),
        bits("Common Clock Configuration", 1 << 6),
        bits("Extended Synch", 1 << 7),
        bits("Enable Clock Power Management", 1 << 8),
        bits("Hardware Autonomous Width Disable", 1 << 9),
    ]);
/// Link status.
pub const LINK_STATUS: Register = Register::new("Link Status", 0x12, Two, "PCIe 7.5.3.8");
/// Slot capabilities; of ports.
pub const SLOT_CAPABILITIES: Register =
    Register::new("Slot Capabilities", 0x14, Four, "PCIe 7.5.3.9");
/// Slot control; of ports.
pub const SLOT_CONTROL: Register = Register::new("Slot Control", 0x18, Two, "PCIe 7.5.3.10");
/// Slot status; of ports.
pub const SLOT_STATUS: Register = Register::new("Slot Status", 0x1a, Two, "PCIe 7.5.3.11");
/// Root control; of root ports.
pub const ROOT_CONTROL: Register = Register::new("Root Control", 0x1c, Two, "PCIe 7.5.3.12");
/// Root capabilities; of root ports.
pub const ROOT_CAPABILITIES: Register =
    Register::new("Root Capabilities", 0x1e, Two, "PCIe 7.5.3.13");
/// Root status; of root ports.
pub const ROOT_STATUS: Register = Register::new("Root Status", 0x20, Four, "PCIe 7.5.3.14");
/// Device capabilities 2.
pub const DEVICE_CAPABILITIES_2: Register =
    Register::new("Device Capabilities 2", 0x24, Four, "PCIe 7.5.3.15");
/// Device control 2.
pub const DEVICE_CONTROL_2: Register =
    Register::new("Device Control 2", 0x28, Two, "PCIe 7.5.3.16").rw(0x7f5f);
/// Device status 2.
pub const DEVICE_STATUS_2: Register = Register::new("Device Status 2", 0x2a, Two, "PCIe 7.5.3.17");
/// Link capabilities 2.
pub const LINK_CAPABILITIES_2: Register =
    Register::new("Link Capabilities 2", 0x2c, Four, "PCIe 7.5.3.18");
/// Link control 2.
pub const LINK_CONTROL_2: Register =
    Register::new("Link Control 2", 0x30, Two, "PCIe 7.5.3.19").rw(0xffbf);
/// Link status 2.
pub const LINK_STATUS_2: Register =
    Register::new("Link Status 2", 0x32, Two, "PCIe 7.5.3.20").rw1c(0x0020);
/// Slot capabilities 2; of ports.
pub const SLOT_CAPABILITIES_2: Register =
    Register::new("Slot Capabilities 2", 0x34, Four, "PCIe 7.5.3.21");
/// Slot control 2; of ports.
pub const SLOT_CONTROL_2: Register = Register::new("Slot Control 2", 0x38, Two, "PCIe 7.5.3.22");
/// Slot status 2; of ports.
pub const SLOT_STATUS_2: Register = Register::new("Slot Status 2", 0x3a, Two, "PCIe 7.5.3.23");

const NAME: &str = "PCI Express";
/// Version 1 of an endpoint ends behind the link registers; another capability may follow at once.
const VERSION_1: Block = Block {
    name: NAME,
    registers: &[
        &start::ID,
        &start::NEXT,
        &CAPABILITIES,
        &DEVICE_CAPABILITIES,
        &DEVICE_CONTROL,
        &DEVICE_STATUS,
        &LINK_CAPABILITIES,
        &LINK_CONTROL,
        &LINK_STATUS,
    ],
};
const VERSION_2: Block = Block {
    name: NAME,
    registers: &[
        &start::ID,
        &start::NEXT,
        &CAPABILITIES,
        &DEVICE_CAPABILITIES,
        &DEVICE_CONTROL,
        &DEVICE_STATUS,
        &LINK_CAPABILITIES,
        &LINK_CONTROL,
        &LINK_STATUS,
        &SLOT_CAPABILITIES,
        &SLOT_CONTROL,
        &SLOT_STATUS,
        &ROOT_CONTROL,
        &ROOT_CAPABILITIES,
        &ROOT_STATUS,
        &DEVICE_CAPABILITIES_2,
        &DEVICE_CONTROL_2,
        &DEVICE_STATUS_2,
        &LINK_CAPABILITIES_2,
        &LINK_CONTROL_2,
        &LINK_STATUS_2,
        &SLOT_CAPABILITIES_2,
        &SLOT_CONTROL_2,
        &SLOT_STATUS_2,
    ],
};

/// The capability, as the value of its capabilities register says it is laid out.
pub const fn block(capabilities: u16) -> &'static Block {
    if capabilities & capabilities::VERSION < 2 {
        &VERSION_1
    } else {
        &VERSION_2
    }
}

/// Bits of the capabilities register.
pub mod capabilities {
    /// Version of the capability.
    pub const VERSION: u16 = 0xf;
}
