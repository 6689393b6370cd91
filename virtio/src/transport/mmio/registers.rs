//! The registers of virtio-mmio (virtio 1.3, section 4.2.2; version 1: section 4.2.4).

use conf_space::Width::{self, Four, One, Two};
use conf_space::registers::Register;

use super::Version;
use crate::register::{Registers, Table};
use crate::status::Interface;
use crate::transport::common::{Area, Half};
use crate::transport::core::{Core, ResetWait};
use crate::transport::signals::Isr;

/// "virt", in the order of a driver's bytes.
pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Ours is the vendor number that QEMU has: there is no registry.
pub(super) const VENDOR: u32 = u32::from_le_bytes(*b"QEMU");
/// Where the device configuration starts.
pub(super) const CONFIG: u64 = 0x100;

/// Length and base of a shared memory region that does not exist (section 4.2.2).
const NO_REGION: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    Magic,
    Version,
    DeviceId,
    VendorId,
    DeviceFeatures,
    DeviceFeaturesSelect,
    DriverFeatures,
    DriverFeaturesSelect,
    GuestPageSize,
    QueueSelect,
    QueueSizeMax,
    QueueSize,
    QueueAlign,
    QueuePage,
    QueueReady,
    QueueNotify,
    InterruptStatus,
    InterruptAck,
    Status,
    Address(Area, Half),
    SharedMemorySelect,
    SharedMemory,
    QueueReset,
    ConfigGeneration,
}

const fn ro(name: &'static str, offset: u16) -> Register {
    Register::new(name, offset, Four, "virtio 1.3, 4.2.2")
}

const fn rw(name: &'static str, offset: u16) -> Register {
    ro(name, offset).rw(0xffff_ffff)
}

const fn legacy(name: &'static str, offset: u16) -> Register {
    Register::new(name, offset, Four, "virtio 1.3, 4.2.4").rw(0xffff_ffff)
}

/// Drivers write 4 bytes; those above the width mean nothing.
const fn narrow(name: &'static str, offset: u16, width: Width) -> Register {
    Register::new(name, offset, width, "virtio 1.3, 4.2.2").rw(width.mask())
}

const MAGIC_VALUE: (Name, Register) = (Name::Magic, ro("MagicValue", 0x000));
const VERSION: (Name, Register) = (Name::Version, ro("Version", 0x004));
const DEVICE_ID: (Name, Register) = (Name::DeviceId, ro("DeviceID", 0x008));
const VENDOR_ID: (Name, Register) = (Name::VendorId, ro("VendorID", 0x00c));
const DEVICE_FEATURES: (Name, Register) = (Name::DeviceFeatures, ro("DeviceFeatures", 0x010));
const DEVICE_FEATURES_SELECT: (Name, Register) =
    (Name::DeviceFeaturesSelect, rw("DeviceFeaturesSel", 0x014));
const DRIVER_FEATURES: (Name, Register) = (Name::DriverFeatures, rw("DriverFeatures", 0x020));
const DRIVER_FEATURES_SELECT: (Name, Register) =
    (Name::DriverFeaturesSelect, rw("DriverFeaturesSel", 0x024));
const QUEUE_SELECT: (Name, Register) = (Name::QueueSelect, narrow("QueueSel", 0x030, Two));
const QUEUE_SIZE_MAX: (Name, Register) = (Name::QueueSizeMax, ro("QueueSizeMax", 0x034));
const QUEUE_SIZE: (Name, Register) = (Name::QueueSize, narrow("QueueSize", 0x038, Two));
const QUEUE_NOTIFY: (Name, Register) = (Name::QueueNotify, rw("QueueNotify", 0x050));
const INTERRUPT_STATUS: (Name, Register) = (Name::InterruptStatus, ro("InterruptStatus", 0x060));
const INTERRUPT_ACK: (Name, Register) = (Name::InterruptAck, narrow("InterruptACK", 0x064, One));
const STATUS: (Name, Register) = (Name::Status, narrow("Status", 0x070, One));

static V1: Table<Name> = Table::new(&[
    MAGIC_VALUE,
    VERSION,
    DEVICE_ID,
    VENDOR_ID,
    DEVICE_FEATURES,
    DEVICE_FEATURES_SELECT,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SELECT,
    (Name::GuestPageSize, legacy("GuestPageSize", 0x028)),
    QUEUE_SELECT,
    QUEUE_SIZE_MAX,
    QUEUE_SIZE,
    (Name::QueueAlign, legacy("QueueAlign", 0x03c)),
    (Name::QueuePage, legacy("QueuePFN", 0x040)),
    QUEUE_NOTIFY,
    INTERRUPT_STATUS,
    INTERRUPT_ACK,
    STATUS,
]);

static V2: Table<Name> = Table::new(&[
    MAGIC_VALUE,
    VERSION,
    DEVICE_ID,
    VENDOR_ID,
    DEVICE_FEATURES,
    DEVICE_FEATURES_SELECT,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SELECT,
    QUEUE_SELECT,
    QUEUE_SIZE_MAX,
    QUEUE_SIZE,
    (Name::QueueReady, ro("QueueReady", 0x044).rw(1)),
    QUEUE_NOTIFY,
    INTERRUPT_STATUS,
    INTERRUPT_ACK,
    STATUS,
    (
        Name::Address(Area::Descriptors, Half::Low),
        rw("QueueDescLow", 0x080),
    ),
    (
        Name::Address(Area::Descriptors, Half::High),
        rw("QueueDescHigh", 0x084),
    ),
    (
        Name::Address(Area::Driver, Half::Low),
        rw("QueueDriverLow", 0x090),
    ),
    (
        Name::Address(Area::Driver, Half::High),
        rw("QueueDriverHigh", 0x094),
    ),
    (
        Name::Address(Area::Device, Half::Low),
        rw("QueueDeviceLow", 0x0a0),
    ),
    (
        Name::Address(Area::Device, Half::High),
        rw("QueueDeviceHigh", 0x0a4),
    ),
    (Name::SharedMemorySelect, rw("SHMSel", 0x0ac)),
    (Name::SharedMemory, ro("SHMLenLow", 0x0b0)),
    (Name::SharedMemory, ro("SHMLenHigh", 0x0b4)),
    (Name::SharedMemory, ro("SHMBaseLow", 0x0b8)),
    (Name::SharedMemory, ro("SHMBaseHigh", 0x0bc)),
    (Name::QueueReset, ro("QueueReset", 0x0c0).rw(1)),
    (Name::ConfigGeneration, ro("ConfigGeneration", 0x0fc)),
]);

pub(super) const fn table(version: Version) -> &'static Table<Name> {
    match version {
        Version::One => &V1,
        Version::Two => &V2,
    }
}

/// The registers of a slot without a device: its driver finds device 0 and looks no further
/// (section 4.2.2.2).
pub(super) struct Empty;

impl Registers<Name> for Empty {
    fn read(&mut self, register: Name) -> u32 {
        match register {
            Name::Magic => MAGIC,
            Name::Version => Version::Two.number(),
            _ => 0,
        }
    }

    fn write(&mut self, _: Name, _: u32) {}

    fn held(&self, _: Name) -> u32 {
        0
    }
}

/// The registers of a device.
pub(super) struct Face<'a> {
    pub core: &'a mut Core,
    pub version: Version,
}

impl Face<'_> {
    const fn interface(&self) -> Interface {
        match self.version {
            Version::One => Interface::Legacy,
            Version::Two => Interface::Modern,
        }
    }
}

impl Registers<Name> for Face<'_> {
    fn read(&mut self, register: Name) -> u32 {
        let interface = self.interface();
        let core = &mut *self.core;
        match register {
            Name::Magic => MAGIC,
            Name::Version => self.version.number(),
            Name::DeviceId => core.kind().id().into(),
            Name::VendorId => VENDOR,
            Name::DeviceFeatures => core.device_features(interface, core.device_feature_select),
            Name::QueueSizeMax => core.queue().map_or(0, |queue| queue.max_size().into()),
            Name::QueuePage | Name::QueueReady => {
                core.poll_queue_reset();
                self.held(register)
            }
            Name::InterruptStatus => core.signals().lock().isr.bits().into(),
            Name::Status => core.status().into(),
            Name::SharedMemory => NO_REGION,
            Name::QueueReset => core.is_queue_resetting().into(),
            Name::ConfigGeneration => core.signals().lock().generation,
            // Write-only.
            Name::DeviceFeaturesSelect
            | Name::DriverFeatures
            | Name::DriverFeaturesSelect
            | Name::GuestPageSize
            | Name::QueueSelect
            | Name::QueueSize
            | Name::QueueAlign
            | Name::QueueNotify
            | Name::InterruptAck
            | Name::Address(..)
            | Name::SharedMemorySelect => 0,
        }
    }

    fn write(&mut self, register: Name, value: u32) {
        let interface = self.interface();
        let core = &mut *self.core;
        let word = (value & 0xffff) as u16;
        let byte = (value & 0xff) as u8;
        match register {
            Name::DeviceFeaturesSelect => core.device_feature_select = value,
            Name::DriverFeaturesSelect => core.driver_feature_select = value,
            Name::DriverFeatures => {
                core.set_driver_features(interface, core.driver_feature_select, value);
            }
            Name::GuestPageSize => core.guest_page_size = value,
            Name::QueueSelect => core.queue_select = word,
            Name::QueueSize => core.configure_queue(|queue| queue.size = word),
            Name::QueueAlign => core.set_queue_align(value),
            Name::QueuePage => core.set_queue_page(value),
            Name::QueueReady if value == 1 => core.enable_queue(),
            Name::QueueReady => core.disable_queue(),
            Name::QueueNotify => core.notify(word),
            Name::InterruptAck => core.signals().acknowledge(Isr::from_bits_truncate(byte)),
            Name::Status => core.set_status(interface, ResetWait::Expects, byte),
            Name::Address(area, half) => {
                core.configure_queue(|queue| area.set(half, queue, value));
            }
            Name::QueueReset if value == 1 => core.reset_queue(),
            Name::Magic
            | Name::Version
            | Name::DeviceId
            | Name::VendorId
            | Name::DeviceFeatures
            | Name::QueueSizeMax
            | Name::InterruptStatus
            | Name::SharedMemorySelect
            | Name::SharedMemory
            | Name::QueueReset
            | Name::ConfigGeneration => {}
        }
        // The path of every request: what it changes, it notes itself.
        if register != Name::QueueNotify {
            core.save();
        }
    }

    fn held(&self, register: Name) -> u32 {
        let core = &*self.core;
        match register {
            Name::DeviceFeaturesSelect => core.device_feature_select,
            Name::DriverFeaturesSelect => core.driver_feature_select,
            Name::DriverFeatures => core.driver_features(core.driver_feature_select),
            Name::GuestPageSize => core.guest_page_size,
            Name::QueueSelect => core.queue_select.into(),
            Name::QueueSize => core.queue().map_or(0, |queue| queue.size.into()),
            Name::QueueAlign => core.queue_align(),
            Name::QueuePage => core.queue_page(),
            Name::QueueReady => core.queue().map_or(0, |queue| queue.ready.into()),
            Name::Address(area, half) => core.queue().map_or(0, |queue| area.get(half, queue)),
            _ => 0,
        }
    }
}
