//! The Advanced Error Reporting capability of an endpoint (PCI Express Base Specification 6.0,
//! section 7.8.4).

use super::{Block, Register, capability};
use crate::access::Width::Four;

/// Uncorrectable errors that were seen. The bits survive a reset of the link.
pub const UNCORRECTABLE_STATUS: Register =
    Register::new("Uncorrectable Error Status", 0x04, Four, "PCIe 7.8.4.2").rw1c(0x07ff_f030);
/// Uncorrectable errors that are not reported.
pub const UNCORRECTABLE_MASK: Register =
    Register::new("Uncorrectable Error Mask", 0x08, Four, "PCIe 7.8.4.3").rw(0x07ff_f030);
/// Which uncorrectable errors are fatal.
pub const UNCORRECTABLE_SEVERITY: Register =
    Register::new("Uncorrectable Error Severity", 0x0c, Four, "PCIe 7.8.4.4").rw(0x07ff_f030);
/// Correctable errors that were seen.
pub const CORRECTABLE_STATUS: Register =
    Register::new("Correctable Error Status", 0x10, Four, "PCIe 7.8.4.5").rw1c(0x0000_f1c1);
/// Correctable errors that are not reported.
pub const CORRECTABLE_MASK: Register =
    Register::new("Correctable Error Mask", 0x14, Four, "PCIe 7.8.4.6").rw(0x0000_f1c1);
/// First error, ECRC, logging.
pub const CONTROL: Register = Register::new(
    "Advanced Error Capabilities and Control",
    0x18,
    Four,
    "PCIe 7.8.4.7",
)
.rw(0x0000_0540);

/// The capability, up to the log of headers.
pub const BLOCK: Block = Block {
    name: "Advanced Error Reporting",
    registers: &[
        &capability::EXTENDED_HEADER,
        &UNCORRECTABLE_STATUS,
        &UNCORRECTABLE_MASK,
        &UNCORRECTABLE_SEVERITY,
        &CORRECTABLE_STATUS,
        &CORRECTABLE_MASK,
        &CONTROL,
    ],
};
