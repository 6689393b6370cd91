//! From a device's description to its hardware: the registers it has and where firmware places its
//! BARs.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex};

use conf_space::capabilities::{CapabilityId, ExtendedCapabilityId};
use conf_space::memory::MemorySpace;
use conf_space::overlay::Identity;
use conf_space::registers::header::{self, command, status};
use conf_space::registers::{Register, capability, error_reporting};
use conf_space::{Bdf, ConfigSize, ConfigSpace, Resource, ResourceFlags, Width};

use super::builder::{FunctionBuilder, PAGE};
use super::function::{Faults, Fixed, Function, Presence};
use super::interrupts::Messages;
use super::virtual_functions::Sriov;

impl FunctionBuilder {
    /// How many virtual functions it has from the beginning.
    pub(super) fn enabled_functions(&self) -> u16 {
        self.virtual_functions.as_ref().map_or(0, |all| all.count)
    }

    /// The function, without its virtual functions.
    pub(super) fn build(mut self, placement: &mut Placement) -> Function {
        let sriov = self
            .virtual_functions
            .take()
            .map(|all| Sriov::new(&self, all, placement));
        for resource in &mut self.resources {
            placement.place(resource);
        }
        let mut function = self.assemble(None);
        if let Some(sriov) = sriov {
            function.add_sriov(sriov);
        }
        function.probe_first();
        function
    }

    /// The function, without a driver and with its BARs where they are. `virtual_of`: for a virtual function, its physical function and
    /// its number there.
    pub(super) fn assemble(self, virtual_of: Option<(Bdf, u16)>) -> Function {
        let is_virtual = virtual_of.is_some();
        let config_size = if self.extended {
            ConfigSize::Extended
        } else {
            ConfigSize::Conventional
        };
        let mut space = MemorySpace::new(config_size);
        self.write_header(&mut space, is_virtual);
        let offsets = self.write_capabilities(&mut space);
        let error_reporting = self.write_error_reporting(&mut space);
        let power_on = (0..config_size.bytes())
            .step_by(4)
            .map(|offset| space.read(offset, Width::Four).unwrap_or(0))
            .collect();
        // What firmware does from here on does not survive a reset.
        if !is_virtual {
            self.write_bars(&space);
            let _ = space.write(
                header::INTERRUPT_LINE.offset,
                Width::One,
                u32::from(self.gsi),
            );
        }
        let find = |id| offsets.get(&id).copied();
        let mut function = Function {
            fixed: Fixed {
                identity: Identity {
                    bdf: self.bdf,
                    vendor: self.vendor,
                    device: self.device,
                    is_virtual_function: is_virtual,
                    interrupt_line: self.gsi,
                    resources: self.resources,
                    config_size,
                },
                subsystem: self.subsystem,
                path: self.path,
                class: self.class,
                virtual_of,
                sriov: None,
                gsi: self.gsi,
                reset_methods: self.reset_methods,
                native_driver: self.driver,
                needed_by_dom0: self.needed_by_dom0,
                msi: find(CapabilityId::MSI),
                msix: find(CapabilityId::MSI_X),
                power: find(CapabilityId::POWER_MANAGEMENT),
                express: find(CapabilityId::PCI_EXPRESS),
                error_reporting,
                table: self.table,
            },
            space,
            power_on,
            presence: Mutex::new(Presence::There),
            messages: Mutex::new(Messages::new(0)),
            model: Mutex::new(self.model),
            owner: Mutex::default(),
            kernel: Mutex::default(),
            faults: Mutex::new(Faults::default()),
            resetting: Mutex::new(false),
            reset_done: Condvar::new(),
        };
        function.messages = Mutex::new(Messages::new(function.table_length()));
        function
    }

    fn write_header(&self, space: &mut MemorySpace, is_virtual: bool) {
        let sized = |register: &&Register| {
            !header::BARS.contains(register) && **register != header::EXPANSION_ROM
        };
        for register in header::TYPE_0.registers.iter().copied().filter(sized) {
            match *register {
                // Of its command register a virtual function has bus mastering alone (PCIe
                // 9.3.4.1.3).
                header::COMMAND if is_virtual => {
                    space.make_writable(
                        register.offset,
                        register.width,
                        u32::from(command::BUS_MASTER),
                    );
                }
                header::INTERRUPT_LINE | header::CACHE_LINE_SIZE | header::LATENCY_TIMER
                    if is_virtual => {}
                _ => space.add_register(0, register),
            }
        }
        let [interface, sub_class, base_class, _] = self.class.to_le_bytes();
        let (vendor, device) = if is_virtual {
            (0xffff, 0xffff)
        } else {
            (self.vendor, self.device)
        };
        for (register, value) in [
            (&header::VENDOR_ID, vendor),
            (&header::DEVICE_ID, device),
            (&header::SUBSYSTEM_VENDOR_ID, self.subsystem.0),
            (&header::SUBSYSTEM_ID, self.subsystem.1),
            (&header::PROGRAMMING_INTERFACE, u16::from(interface)),
            (&header::SUB_CLASS, u16::from(sub_class)),
            (&header::BASE_CLASS, u16::from(base_class)),
            (&header::HEADER_TYPE, u16::from(self.header_type)),
            (&header::INTERRUPT_PIN, u16::from(self.pin)),
        ] {
            space.set(register.offset, register.width, u32::from(value));
        }
        if is_virtual {
            return;
        }
        for (index, register) in header::BARS.iter().enumerate() {
            let Some(resource) = self.resources.get(index).filter(|found| found.is_present())
            else {
                continue;
            };
            let mask = resource.size.wrapping_sub(1);
            let (low, high) = halves(!mask);
            let flags = kind_bits(resource.flags);
            space.make_writable(
                register.offset,
                register.width,
                low & !0xf | io_bits(resource, low),
            );
            space.set(register.offset, register.width, flags);
            if resource.is_64_bit()
                && let Some(upper) = header::BARS.get(index.saturating_add(1))
            {
                space.make_writable(upper.offset, upper.width, high);
            }
        }
        if let Some(rom) = self.resources.last().filter(|rom| rom.is_present()) {
            let (low, _) = halves(!rom.size.wrapping_sub(1));
            let register = &header::EXPANSION_ROM;
            space.make_writable(
                register.offset,
                register.width,
                (low | ROM_ENABLE) & register.rw,
            );
        }
    }

    /// Returns where it is, if the device has it.
    fn write_error_reporting(&self, space: &mut MemorySpace) -> Option<u16> {
        const OFFSET: u16 = 0x100;
        const VERSION: u32 = 2;
        if !self.error_reporting {
            return None;
        }
        for register in error_reporting::BLOCK.registers {
            space.add_register(OFFSET, register);
        }
        let header = u32::from(ExtendedCapabilityId::AER.0) | VERSION << 16;
        let register = &capability::EXTENDED_HEADER;
        space.set(
            OFFSET.saturating_add(register.offset),
            register.width,
            header,
        );
        Some(OFFSET)
    }

    fn write_bars(&self, space: &MemorySpace) {
        let registers = header::BARS.iter().chain([&header::EXPANSION_ROM]);
        for (index, (register, resource)) in registers.zip(&self.resources).enumerate() {
            if !resource.is_present() {
                continue;
            }
            let (low, high) = halves(resource.start);
            let _ = space.write(register.offset, register.width, low);
            if resource.is_64_bit()
                && let Some(upper) = header::BARS.get(index.saturating_add(1))
            {
                let _ = space.write(upper.offset, upper.width, high);
            }
        }
    }

    /// Lays the capabilities out one behind the other. Returns where each is.
    fn write_capabilities(&self, space: &mut MemorySpace) -> BTreeMap<CapabilityId, u16> {
        let mut offsets = BTreeMap::new();
        let mut next = header::END;
        let mut pointer = header::CAPABILITIES_POINTER.offset;
        for image in &self.capabilities {
            space.set(pointer, Width::One, u32::from(next));
            for register in image.registers {
                space.add_register(next, register);
            }
            space.set(next, Width::One, u32::from(image.id.0));
            for (register, value) in &image.values {
                space.set(next.saturating_add(register.offset), register.width, *value);
            }
            offsets.insert(image.id, next);
            pointer = next.saturating_add(capability::NEXT.offset);
            let end = image.registers.last().map_or(4, |last| last.end());
            next = next.saturating_add(end).next_multiple_of(4);
        }
        if self.capabilities.is_empty() {
            return offsets;
        }
        if self.list_loops {
            space.set(pointer, Width::One, u32::from(header::END));
        }
        let value = space
            .read(header::STATUS.offset, header::STATUS.width)
            .unwrap_or(0);
        let value = value | u32::from(status::CAPABILITIES_LIST);
        space.set(header::STATUS.offset, header::STATUS.width, value);
        offsets
    }
}

/// The lowest bits of a BAR: what kind it is (PCIe 7.5.1.2.1).
fn kind_bits(flags: ResourceFlags) -> u32 {
    const IO: u32 = 0x1;
    const WIDE: u32 = 0x4;
    const PREFETCHABLE: u32 = 0x8;
    [
        (ResourceFlags::IO, IO),
        (ResourceFlags::MEMORY_64, WIDE),
        (ResourceFlags::PREFETCHABLE, PREFETCHABLE),
    ]
    .into_iter()
    .filter(|(flag, _)| flags.contains(*flag))
    .fold(0, |bits, (_, bit)| bits | bit)
}

/// Writable bits below 16 that a small I/O BAR has.
fn io_bits(resource: &Resource, mask: u32) -> u32 {
    if resource.is_io() { mask & 0xc } else { 0 }
}

/// Enable bit of the expansion ROM (PCIe 7.5.1.2.4).
const ROM_ENABLE: u32 = 1;

fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

/// Where firmware puts BARs.
#[derive(Debug)]
pub(super) struct Placement {
    memory: u64,
    wide: u64,
    io: u64,
    /// The room that even the smallest memory BAR gets.
    pub least: u64,
}

impl Default for Placement {
    fn default() -> Self {
        Self {
            memory: 0xe000_0000,
            wide: 0x38_0000_0000,
            io: 0xc000,
            least: PAGE.into(),
        }
    }
}

impl Placement {
    pub(super) fn place(&mut self, resource: &mut Resource) {
        if !resource.is_present() {
            return;
        }
        let (window, least) = if resource.is_io() {
            (&mut self.io, 4)
        } else if resource.is_64_bit() {
            (&mut self.wide, u64::from(PAGE))
        } else {
            (&mut self.memory, self.least)
        };
        let room = resource.size.max(least);
        resource.start = window.next_multiple_of(room);
        *window = resource.start.saturating_add(room);
    }
}
