//! The power management capability (PCI Bus Power Management Interface Specification 1.2, section
//! 3.2).

use super::{Block, Register, bits, capability};
use crate::access::Width::{One, Two};

/// Power management capabilities: bits in [`capabilities`].
pub const CAPABILITIES: Register =
    Register::new("Power Management Capabilities", 0x02, Two, "PM 3.2.3");
/// Power management control and status: bits in [`control`].
pub const CONTROL: Register =
    Register::new("Power Management Control/Status", 0x04, Two, "PM 3.2.4")
        .rw(0x1f03)
        .rw1c(0x8000)
        .raz(0x00f4)
        .fields(&[
            bits("Power State", control::POWER_STATE),
            bits("No Soft Reset", control::NO_SOFT_RESET),
            bits("PME Enable", control::PME_ENABLE),
            bits("Data Select", control::DATA_SELECT),
            bits("Data Scale", 3 << 13),
            bits("PME Status", control::PME_STATUS),
        ]);
/// Bridge support extensions.
pub const BRIDGE_EXTENSIONS: Register =
    Register::new("Bridge Support Extensions", 0x06, One, "PM 3.2.5");
/// Data, as chosen by the data select field.
pub const DATA: Register = Register::new("Power Management Data", 0x07, One, "PM 3.2.6");

/// The capability.
pub const BLOCK: Block = Block {
    name: "Power Management",
    registers: &[
        &capability::ID,
        &capability::NEXT,
        &CAPABILITIES,
        &CONTROL,
        &BRIDGE_EXTENSIONS,
        &DATA,
    ],
};

/// Bits of the capabilities register.
pub mod capabilities {
    /// D1 is supported.
    pub const D1: u16 = 1 << 9;
    /// D2 is supported.
    pub const D2: u16 = 1 << 10;
    /// States in which the function can signal PME#.
    pub const PME_SUPPORT: u16 = 0xf800;
}

/// Bits of the control and status register.
pub mod control {
    /// Power state: 0 D0 to 3 D3hot.
    pub const POWER_STATE: u16 = 0x3;
    /// The configuration survives the way from D3hot to D0.
    pub const NO_SOFT_RESET: u16 = 1 << 3;
    /// The function may signal PME#.
    pub const PME_ENABLE: u16 = 1 << 8;
    /// What the data register reports.
    pub const DATA_SELECT: u16 = 0x1e00;
    /// The function signals, or would signal, PME#; cleared by writing one.
    pub const PME_STATUS: u16 = 1 << 15;
}
