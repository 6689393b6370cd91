//! The SR-IOV extended capability, as far as the simulated device has it (PCIe 9.3.3).

use conf_space::Width::Two;
use conf_space::registers::Register;

/// Where it is: right at the start of extended configuration space.
pub(super) const OFFSET: u16 = 0x100;
/// Version of its layout.
pub(super) const VERSION: u32 = 1;
pub(super) const CONTROL: Register = Register::new("SR-IOV Control", 0x08, Two, "PCIe 9.3.3.3");
pub(super) const INITIAL_VFS: Register = Register::new("InitialVFs", 0x0c, Two, "PCIe 9.3.3.5");
pub(super) const TOTAL_VFS: Register = Register::new("TotalVFs", 0x0e, Two, "PCIe 9.3.3.6");
pub(super) const NUM_VFS: Register = Register::new("NumVFs", 0x10, Two, "PCIe 9.3.3.7");
pub(super) const FIRST_VF_OFFSET: Register =
    Register::new("First VF Offset", 0x14, Two, "PCIe 9.3.3.9");
pub(super) const VF_STRIDE: Register = Register::new("VF Stride", 0x16, Two, "PCIe 9.3.3.10");
pub(super) const VF_DEVICE_ID: Register = Register::new("VF Device ID", 0x1a, Two, "PCIe 9.3.3.11");

/// Control: there are virtual functions.
pub(super) const VF_ENABLE: u32 = 1 << 0;
/// Control: they decode memory.
pub(super) const VF_MEMORY_ENABLE: u32 = 1 << 3;
