//! The configuration space header, type 0 (PCI Express Base Specification 6.0, section 7.5.1; PCI
//! Local Bus Specification 3.0, section 6.1).

use super::{Block, Register, bits};
use crate::access::Width::{Four, One, Two};

/// Vendor ID.
pub const VENDOR_ID: Register = Register::new("Vendor ID", 0x00, Two, "PCIe 7.5.1.1.1");
/// Device ID.
pub const DEVICE_ID: Register = Register::new("Device ID", 0x02, Two, "PCIe 7.5.1.1.2");
/// Command: bits in [`command`].
pub const COMMAND: Register = Register::new("Command", 0x04, Two, "PCIe 7.5.1.1.3")
    .rw(0x077f)
    .raz(0xf880)
    .reset(0)
    .fields(&[
        bits("I/O Space Enable", command::IO),
        bits("Memory Space Enable", command::MEMORY),
        bits("Bus Master Enable", command::BUS_MASTER),
        bits("Special Cycle Enable", command::SPECIAL_CYCLES),
        bits("Memory Write and Invalidate", command::WRITE_INVALIDATE),
        bits("VGA Palette Snoop", command::VGA_PALETTE_SNOOP),
        bits("Parity Error Response", command::PARITY_ERROR_RESPONSE),
        bits("IDSEL Stepping", command::IDSEL_STEPPING),
        bits("SERR# Enable", command::SERR),
        bits("Fast Back-to-Back Enable", command::FAST_BACK_TO_BACK),
        bits("Interrupt Disable", command::INTX_DISABLE),
    ]);
/// Status: bits in [`status`].
pub const STATUS: Register = Register::new("Status", 0x06, Two, "PCIe 7.5.1.1.4")
    .rw1c(0xf900)
    .raz(0x0046)
    .fields(&[
        bits("Immediate Readiness", 1 << 0),
        bits("Interrupt Status", status::INTERRUPT),
        bits("Capabilities List", status::CAPABILITIES_LIST),
        bits("66 MHz Capable", 1 << 5),
        bits("Fast Back-to-Back Capable", 1 << 7),
        bits("Master Data Parity Error", 1 << 8),
        bits("DEVSEL Timing", 3 << 9),
        bits("Signaled Target Abort", 1 << 11),
        bits("Received Target Abort", 1 << 12),
        bits("Received Master Abort", 1 << 13),
        bits("Signaled System Error", 1 << 14),
        bits("Detected Parity Error", 1 << 15),
    ]);
/// Revision ID.
pub const REVISION_ID: Register = Register::new("Revision ID", 0x08, One, "PCIe 7.5.1.1.5");
/// Programming interface, low byte of the class code.
pub const PROGRAMMING_INTERFACE: Register =
    Register::new("Programming Interface", 0x09, One, "PCIe 7.5.1.1.6");
/// Sub-class, middle byte of the class code.
pub const SUB_CLASS: Register = Register::new("Sub-Class Code", 0x0a, One, "PCIe 7.5.1.1.6");
/// Base class, high byte of the class code.
pub const BASE_CLASS: Register = Register::new("Base Class Code", 0x0b, One, "PCIe 7.5.1.1.6");
/// Cache line size in double words.
pub const CACHE_LINE_SIZE: Register = Register::new("Cache Line Size", 0x0c, One, "PCIe 7.5.1.1.7")
    .rw(0xff)
    .reset(0);
/// Latency timer.
pub const LATENCY_TIMER: Register = Register::new("Latency Timer", 0x0d, One, "PCIe 7.5.1.1.8")
    .rw(0xff)
    .reset(0);
/// Header type: layout in bits 6:0 ([`header_type`]), bit 7: multi-function device.
pub const HEADER_TYPE: Register =
    Register::new("Header Type", 0x0e, One, "PCIe 7.5.1.1.9").fields(&[
        bits("Header Layout", header_type::LAYOUT as u16),
        bits("Multi-Function Device", 1 << 7),
    ]);
/// Built-in self test: bits in [`bist`].
pub const BIST: Register = Register::new("BIST", 0x0f, One, "PCIe 7.5.1.1.10")
    .rw(0x40)
    .raz(0x30)
    .fields(&[
        bits("Completion Code", 0xf),
        bits("Start BIST", bist::START as u16),
        bits("BIST Capable", 1 << 7),
    ]);
/// Base address registers 0 to 5.
pub const BARS: [Register; 6] = [
    Register::new("BAR 0", 0x10, Four, "PCIe 7.5.1.2.1").rw(0xffff_fff0),
    Register::new("BAR 1", 0x14, Four, "PCIe 7.5.1.2.1").rw(0xffff_fff0),
    Register::new("BAR 2", 0x18, Four, "PCIe 7.5.1.2.1").rw(0xffff_fff0),
    Register::new("BAR 3", 0x1c, Four, "PCIe 7.5.1.2.1").rw(0xffff_fff0),
    Register::new("BAR 4", 0x20, Four, "PCIe 7.5.1.2.1").rw(0xffff_fff0),
    Register::new("BAR 5", 0x24, Four, "PCIe 7.5.1.2.1").rw(0xffff_fff0),
];
/// CardBus CIS pointer.
pub const CARDBUS_CIS: Register =
    Register::new("CardBus CIS Pointer", 0x28, Four, "PCIe 7.5.1.2.2");
/// Subsystem vendor ID.
pub const SUBSYSTEM_VENDOR_ID: Register =
    Register::new("Subsystem Vendor ID", 0x2c, Two, "PCIe 7.5.1.2.3");
/// Subsystem ID.
pub const SUBSYSTEM_ID: Register = Register::new("Subsystem ID", 0x2e, Two, "PCIe 7.5.1.2.3");
/// Expansion ROM base address.
pub const EXPANSION_ROM: Register =
    Register::new("Expansion ROM Base Address", 0x30, Four, "PCIe 7.5.1.2.4").rw(0xffff_f801);
/// Offset of the first capability.
pub const CAPABILITIES_POINTER: Register =
    Register::new("Capabilities Pointer", 0x34, One, "PCIe 7.5.1.1.11");
/// Interrupt line: whatever software wants to remember.
pub const INTERRUPT_LINE: Register =
    Register::new("Interrupt Line", 0x3c, One, "PCIe 7.5.1.1.12").rw(0xff);
/// Interrupt pin: 0 none, 1 to 4 INTA to INTD.
pub const INTERRUPT_PIN: Register = Register::new("Interrupt Pin", 0x3d, One, "PCIe 7.5.1.1.13");
/// Min_Gnt.
pub const MIN_GNT: Register = Register::new("Min_Gnt", 0x3e, One, "PCIe 7.5.1.2.5");
/// Max_Lat.
pub const MAX_LAT: Register = Register::new("Max_Lat", 0x3f, One, "PCIe 7.5.1.2.5");

/// Offset of the first byte behind the header; capabilities start here.
pub const END: u16 = 0x40;

/// The type 0 header.
pub const TYPE_0: Block = Block {
    name: "Header",
    registers: &[
        &VENDOR_ID,
        &DEVICE_ID,
        &COMMAND,
        &STATUS,
        &REVISION_ID,
        &PROGRAMMING_INTERFACE,
        &SUB_CLASS,
        &BASE_CLASS,
        &CACHE_LINE_SIZE,
        &LATENCY_TIMER,
        &HEADER_TYPE,
        &BIST,
        &BARS[0],
        &BARS[1],
        &BARS[2],
        &BARS[3],
        &BARS[4],
        &BARS[5],
        &CARDBUS_CIS,
        &SUBSYSTEM_VENDOR_ID,
        &SUBSYSTEM_ID,
        &EXPANSION_ROM,
        &CAPABILITIES_POINTER,
        &INTERRUPT_LINE,
        &INTERRUPT_PIN,
        &MIN_GNT,
        &MAX_LAT,
    ],
};

/// Bits of the command register.
pub mod command {
    /// I/O space decode.
    pub const IO: u16 = 1 << 0;
    /// Memory space decode.
    pub const MEMORY: u16 = 1 << 1;
    /// Bus master.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Special cycles.
    pub const SPECIAL_CYCLES: u16 = 1 << 3;
    /// Memory write and invalidate.
    pub const WRITE_INVALIDATE: u16 = 1 << 4;
    /// VGA palette snoop.
    pub const VGA_PALETTE_SNOOP: u16 = 1 << 5;
    /// Parity error response.
    pub const PARITY_ERROR_RESPONSE: u16 = 1 << 6;
    /// IDSEL stepping, once called wait cycle control.
    pub const IDSEL_STEPPING: u16 = 1 << 7;
    /// SERR# reporting.
    pub const SERR: u16 = 1 << 8;
    /// Fast back-to-back transactions.
    pub const FAST_BACK_TO_BACK: u16 = 1 << 9;
    /// INTx off.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Bits of the status register.
pub mod status {
    /// The function asks for its interrupt line.
    pub const INTERRUPT: u16 = 1 << 3;
    /// There is a capability list.
    pub const CAPABILITIES_LIST: u16 = 1 << 4;
}

/// Layouts of the header: bits 6:0 of the header type register.
pub mod header_type {
    /// The bits that hold the layout.
    pub const LAYOUT: u8 = 0x7f;
    /// An ordinary function.
    pub const ENDPOINT: u8 = 0;
    /// A PCI-to-PCI bridge.
    pub const BRIDGE: u8 = 1;
    /// A CardBus bridge.
    pub const CARDBUS: u8 = 2;
}

/// Values of the interrupt pin register.
pub mod interrupt_pin {
    /// INTA.
    pub const INTA: u32 = 1;
}

/// Bits of the BIST register.
pub mod bist {
    /// Starts the test; the device clears it when done.
    pub const START: u8 = 1 << 6;
}
