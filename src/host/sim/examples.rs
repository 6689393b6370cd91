//! The devices of the embedded platform: one of each kind that a PCI backend has to deal with.

use conf_space::Bdf;

use super::SimBus;
use super::builder::{FunctionBuilder, VirtualFunctions};
use super::models::{Network, Nvme};

/// A PCI Express root port.
pub const BRIDGE: Bdf = Bdf::from_devfn(0, 0x00, 0x1c << 3);
/// The SATA controller that dom0's root file system is on.
pub const BOOT_CONTROLLER: Bdf = Bdf::from_devfn(0, 0x00, 0x1f << 3 | 2);
/// A network card with SR-IOV, and its two virtual functions.
pub const NIC: Bdf = Bdf::from_devfn(0, 0x01, 0);
/// The network card's first virtual function.
pub const NIC_VF0: Bdf = Bdf::from_devfn(0, 0x01, 0x10 << 3);
/// The network card's second virtual function.
pub const NIC_VF1: Bdf = Bdf::from_devfn(0, 0x01, 0x10 << 3 | 2);
/// An NVMe drive with four MSI-X vectors.
pub const NVME: Bdf = Bdf::from_devfn(0, 0x02, 0);
/// A network card of old that has neither MSI nor MSI-X, and no reset of its own.
pub const INTX_ONLY: Bdf = Bdf::from_devfn(0, 0x03, 0);
/// A SATA controller with MSI only, of four vectors.
pub const MSI_ONLY: Bdf = Bdf::from_devfn(0, 0x04, 0);
/// A device whose capability list loops, and whose MSI-X table lies outside of its BAR.
pub const BROKEN: Bdf = Bdf::from_devfn(0, 0x05, 0);

const ETHERNET: u32 = 0x02_0000;
const SATA_AHCI: u32 = 0x01_0601;
const NVM_EXPRESS: u32 = 0x01_0802;
const PCI_BRIDGE: u32 = 0x06_0400;
const OTHER: u32 = 0xff_0000;
const INTEL: u16 = 0x8086;

/// The root port that a slot is behind. Only the first one, [`BRIDGE`], is there to be looked at.
const fn root_port(slot: u8) -> Bdf {
    Bdf::from_devfn(0, 0x00, 0x1c << 3 | slot)
}

pub(super) fn add_all(bus: &SimBus) {
    let network = || -> Box<dyn super::Model> { Box::new(Network::default()) };
    bus.add(
        FunctionBuilder::new(BRIDGE, INTEL, 0xa110, PCI_BRIDGE)
            .bridge()
            .driver("pcieport"),
    );
    bus.add(
        FunctionBuilder::new(BOOT_CONTROLLER, INTEL, 0xa102, SATA_AHCI)
            .memory_bar(5, 0x800)
            .intx(16)
            .power_management(true)
            .msi(1, false)
            .driver("ahci")
            .needed_by_dom0("the root file system is on its disk sda"),
    );
    bus.add(
        FunctionBuilder::new(NIC, INTEL, 0x10c9, ETHERNET)
            .behind(root_port(0))
            .memory_bar(0, 0x2_0000)
            .io_bar(2, 0x20)
            .memory_bar(3, 0x4000)
            .rom(0x2_0000)
            .intx(17)
            .power_management(true)
            .msi(1, true)
            .msix(10, 3, 0)
            .express()
            .driver("igb")
            .model(network())
            .virtual_functions(VirtualFunctions {
                count: 2,
                total: 8,
                device: 0x10ca,
                first_offset: 0x80,
                stride: 2,
                bar_size: 0x4000,
                vectors: 3,
                driver: "igbvf",
                model: network,
            }),
    );
    bus.add(
        FunctionBuilder::new(NVME, 0x1b36, 0x0010, NVM_EXPRESS)
            .behind(root_port(1))
            .wide_bar(0, 0x4000)
            .intx(18)
            .power_management(false)
            .msix(4, 0, 0x2000)
            .express()
            .error_reporting()
            .driver("nvme")
            .model(Box::new(Nvme::default())),
    );
    bus.add(
        FunctionBuilder::new(INTX_ONLY, 0x10ec, 0x8139, ETHERNET)
            .behind(root_port(2))
            .io_bar(0, 0x100)
            .memory_bar(1, 0x100)
            .intx(19)
            .power_management(true)
            .driver("8139too"),
    );
    bus.add(
        FunctionBuilder::new(MSI_ONLY, 0x1b4b, 0x9235, SATA_AHCI)
            .behind(root_port(3))
            .memory_bar(5, 0x800)
            .intx(20)
            .power_management(true)
            .msi(4, true)
            .reset_methods(&["pm"])
            .driver("ahci"),
    );
    bus.add(
        FunctionBuilder::new(BROKEN, 0x1b36, 0x0005, OTHER)
            .behind(root_port(4))
            .memory_bar(0, 0x1000)
            .power_management(true)
            .msix(64, 0, 0x0e00)
            .looping_capabilities()
            .reset_methods(&["bus"]),
    );
}
