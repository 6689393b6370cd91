//! How a simulated device is described: its identity, BARs, capabilities, and what the kernel makes
//! of it.

use conf_space::capabilities::CapabilityId;
use conf_space::registers::header::{self, header_type};
use conf_space::registers::{Register, express, msi, msix, power_management};
use conf_space::selector::SlotPath;
use conf_space::{Bdf, Resource, ResourceFlags};

use super::memory::Model;

/// A device as it is about to be plugged in. Nothing is checked: hardware may be as broken as it
/// likes.
#[derive(Debug)]
pub struct FunctionBuilder {
    pub(super) bdf: Bdf,
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) class: u32,
    pub(super) subsystem: (u16, u16),
    pub(super) path: SlotPath,
    pub(super) header_type: u8,
    pub(super) resources: [Resource; 7],
    pub(super) pin: u8,
    pub(super) gsi: u8,
    pub(super) capabilities: Vec<Image>,
    pub(super) list_loops: bool,
    pub(super) extended: bool,
    pub(super) error_reporting: bool,
    pub(super) table: Option<(u8, u64)>,
    pub(super) reset_methods: Vec<String>,
    pub(super) driver: Option<String>,
    pub(super) needed_by_dom0: Option<String>,
    pub(super) model: Option<Box<dyn Model>>,
    pub(super) virtual_functions: Option<VirtualFunctions>,
}

/// The virtual functions of a device.
#[derive(Debug, Clone)]
pub struct VirtualFunctions {
    /// How many are enabled when it is plugged in.
    pub count: u16,
    /// How many there can be.
    pub total: u16,
    /// Their device id.
    pub device: u16,
    /// From the physical function's routing id (bus, device and function as one number) to the
    /// first one's.
    pub first_offset: u16,
    /// From one's routing id to the next one's.
    pub stride: u16,
    /// Size of BAR 0, which holds what `model` is behind, in bytes.
    pub bar_size: u32,
    /// Length of the MSI-X table, which is in BAR 3.
    pub vectors: u16,
    /// dom0's driver for them.
    pub driver: &'static str,
    /// Makes what lies behind the BARs of each.
    pub model: fn() -> Box<dyn Model>,
}

/// A capability's registers.
#[derive(Debug)]
pub(super) struct Image {
    pub id: CapabilityId,
    pub registers: &'static [&'static Register],
    pub values: Vec<(&'static Register, u32)>,
}

/// The table and the pending bits of MSI-X are in pages of their own.
pub(super) const PAGE: u32 = 0x1000;
/// The PCI Express capability of an endpoint, version 2.
const EXPRESS_VERSION: u16 = 2;
/// Device capabilities: the function can be reset by itself (PCIe 7.5.3.3, bit 28).
const FLR_CAPABLE: u32 = 1 << 28;
/// Version 3 of the power management capability (PM 3.2.3).
const POWER_VERSION: u32 = 3;

impl FunctionBuilder {
    /// A device with nothing but an identity.
    pub fn new(bdf: Bdf, vendor: u16, device: u16, class: u32) -> Self {
        Self {
            bdf,
            vendor,
            device,
            class,
            subsystem: (vendor, device),
            path: SlotPath::root(bdf),
            header_type: header_type::ENDPOINT,
            resources: [Resource::ABSENT; 7],
            pin: 0,
            gsi: 0,
            capabilities: Vec::new(),
            list_loops: false,
            extended: false,
            error_reporting: false,
            table: None,
            reset_methods: Vec::new(),
            driver: None,
            needed_by_dom0: None,
            model: None,
            virtual_functions: None,
        }
    }

    /// A bridge's header.
    pub fn bridge(mut self) -> Self {
        self.header_type = header_type::BRIDGE;
        self
    }

    /// In the slot behind this root port.
    pub fn behind(mut self, port: Bdf) -> Self {
        self.path = SlotPath::below(port, self.bdf);
        self
    }

    fn resource(mut self, index: usize, size: u64, flags: ResourceFlags) -> Self {
        if let Some(resource) = self.resources.get_mut(index) {
            *resource = Resource {
                start: 0,
                size,
                flags,
            };
        }
        self
    }

    /// A memory BAR. `size` in bytes, a power of two from 16.
    pub fn memory_bar(self, index: u8, size: u32) -> Self {
        self.resource(usize::from(index), u64::from(size), ResourceFlags::MEMORY)
    }

    /// A 64-bit, prefetchable memory BAR, which takes the next one for its upper half.
    pub fn wide_bar(self, index: u8, size: u64) -> Self {
        let flags = ResourceFlags::MEMORY | ResourceFlags::MEMORY_64 | ResourceFlags::PREFETCHABLE;
        self.resource(usize::from(index), size, flags)
    }

    /// An I/O BAR. `size` in ports, a power of two from 4.
    pub fn io_bar(self, index: u8, size: u32) -> Self {
        self.resource(usize::from(index), u64::from(size), ResourceFlags::IO)
    }

    /// An expansion ROM. `size` in bytes, a power of two from 2048.
    pub fn rom(self, size: u32) -> Self {
        self.resource(header::BARS.len(), u64::from(size), ResourceFlags::MEMORY)
    }

    /// INTA, wired to a line.
    pub fn intx(mut self, gsi: u8) -> Self {
        self.pin = 1;
        self.gsi = gsi;
        self
    }

    fn capability(
        mut self,
        id: CapabilityId,
        registers: &'static [&'static Register],
        values: Vec<(&'static Register, u32)>,
    ) -> Self {
        self.capabilities.push(Image {
            id,
            registers,
            values,
        });
        self
    }

    /// Power management. Without `keeps_state` the device comes back from D3hot as after a reset.
    pub fn power_management(self, keeps_state: bool) -> Self {
        let control = if keeps_state {
            power_management::control::NO_SOFT_RESET
        } else {
            0
        };
        self.capability(
            CapabilityId::POWER_MANAGEMENT,
            power_management::BLOCK.registers,
            vec![
                (&power_management::CAPABILITIES, POWER_VERSION),
                (&power_management::CONTROL, u32::from(control)),
            ],
        )
    }

    /// MSI with 64-bit addresses. `vectors`: a power of two up to 32.
    pub fn msi(self, vectors: u8, maskable: bool) -> Self {
        let field = u16::try_from(vectors.trailing_zeros()).unwrap_or(0)
            << msi::control::MULTIPLE_CAPABLE.trailing_zeros();
        let maskable = if maskable { msi::control::MASKABLE } else { 0 };
        let control = msi::control::ADDRESS_64 | maskable | field;
        self.capability(
            CapabilityId::MSI,
            msi::block(control).registers,
            vec![(&msi::CONTROL, u32::from(control))],
        )
    }

    /// MSI-X with its table at `offset` in a BAR, which is a multiple of 8, and the pending bits in
    /// the page behind it.
    pub fn msix(mut self, vectors: u16, bar: u8, offset: u32) -> Self {
        self.table = Some((bar, u64::from(offset)));
        let pending = offset.saturating_add(PAGE);
        self.capability(
            CapabilityId::MSI_X,
            msix::BLOCK.registers,
            vec![
                (&msix::CONTROL, u32::from(vectors.saturating_sub(1))),
                (&msix::TABLE, offset | u32::from(bar)),
                (&msix::PENDING, pending | u32::from(bar)),
            ],
        )
    }

    /// PCI Express, with function level reset and 4096 bytes of configuration space.
    pub fn express(mut self) -> Self {
        self.extended = true;
        self.reset_methods = vec!["flr".to_owned()];
        self.capability(
            CapabilityId::PCI_EXPRESS,
            express::block(EXPRESS_VERSION).registers,
            vec![
                (&express::CAPABILITIES, u32::from(EXPRESS_VERSION)),
                (&express::DEVICE_CAPABILITIES, FLR_CAPABLE),
            ],
        )
    }

    /// Advanced Error Reporting, the first and only extended capability. Comes after [`FunctionBuilder::express`], and not with virtual
    /// functions.
    pub fn error_reporting(mut self) -> Self {
        self.error_reporting = true;
        self
    }

    /// The capability list leads back to its beginning.
    pub fn looping_capabilities(mut self) -> Self {
        self.list_loops = true;
        self
    }

    /// How the kernel can reset it, as in sysfs `reset_method`.
    pub fn reset_methods(mut self, methods: &[&str]) -> Self {
        self.reset_methods = methods.iter().map(|&name| name.to_owned()).collect();
        self
    }

    /// dom0's driver for it, which is bound.
    pub fn driver(mut self, name: &str) -> Self {
        self.driver = Some(name.to_owned());
        self
    }

    /// Why dom0 cannot do without it.
    pub fn needed_by_dom0(mut self, reason: &str) -> Self {
        self.needed_by_dom0 = Some(reason.to_owned());
        self
    }

    /// What lies behind its BARs.
    pub fn model(mut self, model: Box<dyn Model>) -> Self {
        self.model = Some(model);
        self
    }

    /// Makes it an SR-IOV physical function.
    pub fn virtual_functions(mut self, functions: VirtualFunctions) -> Self {
        self.virtual_functions = Some(functions);
        self
    }
}
