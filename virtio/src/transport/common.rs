//! The common configuration of a modern PCI device (virtio 1.3, section 4.1.4.3).

use conf_space::Width::{self, Four, One, Two};
use conf_space::registers::Register;

use super::core::{Core, ResetWait};
use crate::queue::QueueConfig;
use crate::register::{Registers, Table};
use crate::status::Interface::Modern;

const SPEC: &str = "virtio 1.3, 4.1.4.3";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOffset,
    Address(Area, Half),
    QueueNotifyData,
    QueueReset,
}

/// A part of a queue that has an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Area {
    Descriptors,
    Driver,
    Device,
}

/// Drivers access addresses as two halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    Low,
    High,
}

impl Area {
    pub(super) fn get(self, half: Half, queue: &QueueConfig) -> u32 {
        let address = match self {
            Self::Descriptors => queue.descriptors,
            Self::Driver => queue.driver,
            Self::Device => queue.device,
        };
        match half {
            Half::Low => (address & 0xffff_ffff) as u32,
            Half::High => (address >> 32) as u32,
        }
    }

    pub(super) fn set(self, half: Half, queue: &mut QueueConfig, value: u32) {
        let address = match self {
            Self::Descriptors => &mut queue.descriptors,
            Self::Driver => &mut queue.driver,
            Self::Device => &mut queue.device,
        };
        *address = match half {
            Half::Low => (*address & !0xffff_ffff) | u64::from(value),
            Half::High => (*address & 0xffff_ffff) | u64::from(value) << 32,
        };
    }
}

const fn ro(name: &'static str, offset: u16, width: Width) -> Register {
    Register::new(name, offset, width, SPEC)
}

const fn rw(name: &'static str, offset: u16, width: Width) -> Register {
    ro(name, offset, width).rw(width.mask())
}

pub(crate) static TABLE: Table<Name> = Table::new(&[
    (
        Name::DeviceFeatureSelect,
        rw("device_feature_select", 0x00, Four),
    ),
    (Name::DeviceFeature, ro("device_feature", 0x04, Four)),
    (
        Name::DriverFeatureSelect,
        rw("driver_feature_select", 0x08, Four),
    ),
    (Name::DriverFeature, rw("driver_feature", 0x0c, Four)),
    (Name::ConfigVector, rw("config_msix_vector", 0x10, Two)),
    (Name::NumQueues, ro("num_queues", 0x12, Two)),
    (Name::DeviceStatus, rw("device_status", 0x14, One)),
    (Name::ConfigGeneration, ro("config_generation", 0x15, One)),
    (Name::QueueSelect, rw("queue_select", 0x16, Two)),
    (Name::QueueSize, rw("queue_size", 0x18, Two)),
    (Name::QueueVector, rw("queue_msix_vector", 0x1a, Two)),
    (Name::QueueEnable, ro("queue_enable", 0x1c, Two).rw(1)),
    (Name::QueueNotifyOffset, ro("queue_notify_off", 0x1e, Two)),
    (
        Name::Address(Area::Descriptors, Half::Low),
        rw("queue_desc (low)", 0x20, Four),
    ),
    (
        Name::Address(Area::Descriptors, Half::High),
        rw("queue_desc (high)", 0x24, Four),
    ),
    (
        Name::Address(Area::Driver, Half::Low),
        rw("queue_driver (low)", 0x28, Four),
    ),
    (
        Name::Address(Area::Driver, Half::High),
        rw("queue_driver (high)", 0x2c, Four),
    ),
    (
        Name::Address(Area::Device, Half::Low),
        rw("queue_device (low)", 0x30, Four),
    ),
    (
        Name::Address(Area::Device, Half::High),
        rw("queue_device (high)", 0x34, Four),
    ),
    (
        Name::QueueNotifyData,
        ro("queue_notif_config_data", 0x38, Two),
    ),
    (Name::QueueReset, ro("queue_reset", 0x3a, Two).rw(1)),
]);

/// The driver reads.
pub(crate) fn read(core: &mut Core, offset: u64, width: Width) -> u32 {
    TABLE.read(&mut Face(core), offset, width)
}

/// The driver writes.
pub(crate) fn write(core: &mut Core, offset: u64, width: Width, value: u32) {
    TABLE.write(&mut Face(core), offset, width, value);
}

struct Face<'a>(&'a mut Core);

impl Face<'_> {
    fn of_queue(&self, get: impl FnOnce(&QueueConfig) -> u32) -> u32 {
        self.0.queue().map_or(0, get)
    }
}

impl Registers<Name> for Face<'_> {
    fn read(&mut self, register: Name) -> u32 {
        let core = &mut *self.0;
        let selected = core.queue_select;
        match register {
            Name::DeviceFeature => core.device_features(Modern, core.device_feature_select),
            Name::NumQueues => core.queue_count().into(),
            Name::DeviceStatus => core.status().into(),
            Name::ConfigGeneration => core.signals().lock().generation & 0xff,
            Name::ConfigVector => core.signals().lock().config_vector().into(),
            Name::QueueVector => core.signals().lock().queue_vector(selected).into(),
            // Also what the driver is to notify with: its number, which serves every layout.
            Name::QueueNotifyOffset | Name::QueueNotifyData => self.of_queue(|_| selected.into()),
            Name::QueueReset => core.is_queue_resetting().into(),
            Name::DeviceFeatureSelect
            | Name::DriverFeatureSelect
            | Name::DriverFeature
            | Name::QueueSelect
            | Name::QueueSize
            | Name::Address(..) => self.held(register),
            Name::QueueEnable => {
                core.poll_queue_reset();
                self.held(register)
            }
        }
    }

    fn write(&mut self, register: Name, value: u32) {
        let core = &mut *self.0;
        let word = (value & 0xffff) as u16;
        match register {
            Name::DeviceFeatureSelect => core.device_feature_select = value,
            Name::DriverFeatureSelect => core.driver_feature_select = value,
            Name::DriverFeature => {
                core.set_driver_features(Modern, core.driver_feature_select, value);
            }
            Name::ConfigVector => core.signals().lock().set_config_vector(word),
            Name::DeviceStatus => core.set_status(Modern, ResetWait::Polls, (value & 0xff) as u8),
            Name::QueueSelect => core.queue_select = word,
            Name::QueueSize => core.configure_queue(|queue| queue.size = word),
            Name::QueueVector => {
                let queue = core.queue_select;
                core.signals().lock().set_queue_vector(queue, word);
            }
            Name::QueueEnable if value == 1 => core.enable_queue(),
            Name::QueueReset if value == 1 => core.reset_queue(),
            Name::Address(area, half) => {
                core.configure_queue(|queue| area.set(half, queue, value));
            }
            Name::QueueEnable
            | Name::QueueReset
            | Name::DeviceFeature
            | Name::NumQueues
            | Name::ConfigGeneration
            | Name::QueueNotifyOffset
            | Name::QueueNotifyData => {}
        }
        core.save();
    }

    fn held(&self, register: Name) -> u32 {
        let core = &*self.0;
        match register {
            Name::DeviceFeatureSelect => core.device_feature_select,
            Name::DriverFeatureSelect => core.driver_feature_select,
            Name::DriverFeature => core.driver_features(core.driver_feature_select),
            Name::ConfigVector => core.signals().lock().written_config_vector().into(),
            Name::QueueSelect => core.queue_select.into(),
            Name::QueueSize => self.of_queue(|queue| queue.size.into()),
            Name::QueueVector => {
                let state = core.signals().lock();
                state.written_queue_vector(core.queue_select).into()
            }
            Name::QueueEnable => self.of_queue(|queue| queue.ready.into()),
            Name::Address(area, half) => self.of_queue(|queue| area.get(half, queue)),
            Name::DeviceFeature
            | Name::NumQueues
            | Name::DeviceStatus
            | Name::ConfigGeneration
            | Name::QueueNotifyOffset
            | Name::QueueNotifyData
            | Name::QueueReset => 0,
        }
    }
}
