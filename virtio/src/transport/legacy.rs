//! The register block of virtio 0.9.5 (virtio 1.3, section 4.1.4.10). With MSI-X on, two vector
//! registers stand in front of the device configuration.

use conf_space::Width::{self, Four, One, Two};
use conf_space::registers::Register;

use super::core::{Core, ResetWait};
use super::{config, signals};
use crate::register::{Registers, Table};
use crate::status::Interface::Legacy;

const SPEC: &str = "virtio 1.3, 4.1.4.10";

/// Ports or bytes that the block takes with any device's configuration: the largest, a block
/// device's, has 96 bytes.
pub(crate) const BYTES: u64 = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    DeviceFeatures,
    DriverFeatures,
    QueueAddress,
    QueueSize,
    QueueSelect,
    QueueNotify,
    Status,
    Isr,
    ConfigVector,
    QueueVector,
}

const fn register(name: &'static str, offset: u16, width: Width) -> Register {
    Register::new(name, offset, width, SPEC)
}

const DEVICE_FEATURES: Register = register("Device Features", 0, Four);
const DRIVER_FEATURES: Register = register("Driver Features", 4, Four).rw(0xffff_ffff);
/// The queue's address divided by 4096.
const QUEUE_ADDRESS: Register = register("Queue Address", 8, Four).rw(0xffff_ffff);
const QUEUE_SIZE: Register = register("Queue Size", 12, Two);
const QUEUE_SELECT: Register = register("Queue Select", 14, Two).rw(0xffff);
const QUEUE_NOTIFY: Register = register("Queue Notify", 16, Two).rw(0xffff);
const STATUS: Register = register("Device Status", 18, One).rw(0xff);
/// Reading clears it.
const ISR: Register = register("ISR Status", 19, One);
const CONFIG_VECTOR: Register = register("Configuration Vector", 20, Two).rw(0xffff);
const QUEUE_VECTOR: Register = register("Queue Vector", 22, Two).rw(0xffff);

const REGISTERS: &[(Name, Register)] = &[
    (Name::DeviceFeatures, DEVICE_FEATURES),
    (Name::DriverFeatures, DRIVER_FEATURES),
    (Name::QueueAddress, QUEUE_ADDRESS),
    (Name::QueueSize, QUEUE_SIZE),
    (Name::QueueSelect, QUEUE_SELECT),
    (Name::QueueNotify, QUEUE_NOTIFY),
    (Name::Status, STATUS),
    (Name::Isr, ISR),
    (Name::ConfigVector, CONFIG_VECTOR),
    (Name::QueueVector, QUEUE_VECTOR),
];
/// Those in front of the vectors.
const COMMON: usize = 8;

static WITHOUT_MSIX: Table<Name> = Table::new(REGISTERS.split_at(COMMON).0);
static WITH_MSIX: Table<Name> = Table::new(REGISTERS);

fn table(core: &Core) -> &'static Table<Name> {
    if core.signals().is_msix_enabled() {
        &WITH_MSIX
    } else {
        &WITHOUT_MSIX
    }
}

/// The driver reads, in I/O or in memory.
pub(crate) fn read(core: &mut Core, offset: u64, width: Width) -> u32 {
    let table = table(core);
    let registers = table.read(&mut Face(core), offset, width);
    registers | config::read(core, table.length().into(), offset, width)
}

/// The driver writes.
pub(crate) fn write(core: &mut Core, offset: u64, width: Width, value: u32) {
    let table = table(core);
    table.write(&mut Face(core), offset, width, value);
    config::write(core, table.length().into(), offset, width, value);
}

struct Face<'a>(&'a mut Core);

impl Registers<Name> for Face<'_> {
    fn read(&mut self, register: Name) -> u32 {
        let core = &mut *self.0;
        match register {
            Name::DeviceFeatures => core.device_features(Legacy, 0),
            Name::QueueSize => core.queue().map_or(0, |queue| queue.size.into()),
            Name::QueueNotify => 0,
            Name::Status => core.status().into(),
            Name::Isr => core.signals().take_isr().bits().into(),
            Name::ConfigVector => core.signals().lock().config_vector().into(),
            Name::QueueVector => {
                let queue = core.queue_select;
                core.signals().lock().queue_vector(queue).into()
            }
            Name::QueueAddress => {
                core.poll_queue_reset();
                self.held(register)
            }
            Name::DriverFeatures | Name::QueueSelect => self.held(register),
        }
    }

    fn write(&mut self, register: Name, value: u32) {
        let core = &mut *self.0;
        let word = (value & 0xffff) as u16;
        match register {
            Name::DriverFeatures => core.set_driver_features(Legacy, 0, value),
            Name::QueueAddress => core.set_queue_page(value),
            Name::QueueSelect => core.queue_select = word,
            Name::QueueNotify => core.notify(word),
            Name::Status => core.set_status(Legacy, ResetWait::Expects, (value & 0xff) as u8),
            Name::ConfigVector => core.signals().lock().set_config_vector(word),
            Name::QueueVector => {
                let queue = core.queue_select;
                core.signals().lock().set_queue_vector(queue, word);
            }
            Name::DeviceFeatures | Name::QueueSize | Name::Isr => {}
        }
        // The path of every request: what it changes, it notes itself.
        if register != Name::QueueNotify {
            core.save();
        }
    }

    fn held(&self, register: Name) -> u32 {
        let core = &*self.0;
        let state = || -> std::sync::MutexGuard<'_, signals::State> { core.signals().lock() };
        match register {
            Name::DriverFeatures => core.driver_features(0),
            Name::QueueAddress => core.queue_page(),
            Name::QueueSelect => core.queue_select.into(),
            Name::ConfigVector => state().written_config_vector().into(),
            Name::QueueVector => state().written_queue_vector(core.queue_select).into(),
            Name::DeviceFeatures
            | Name::QueueSize
            | Name::QueueNotify
            | Name::Status
            | Name::Isr => 0,
        }
    }
}
