//! The capabilities that tell a driver where a function has its register blocks (virtio 1.3, section
//! 4.1.4).

use conf_space::Width::{self, Four, One};
use conf_space::registers::{Block, Register, capability};

const fn register(name: &'static str, offset: u16, width: Width) -> Register {
    Register::new(name, offset, width, "virtio 1.3, 4.1.4")
}

/// Bytes of the capability.
pub const LENGTH: Register = register("cap_len", 2, One);
/// What it points to: a [`Kind`].
pub const KIND: Register = register("cfg_type", 3, One);
/// Number of the BAR.
pub const BAR: Register = register("bar", 4, One);
/// Tells several of a kind apart.
pub const ID: Register = register("id", 5, One);
/// From the start of the BAR, in bytes.
pub const OFFSET: Register = register("offset", 8, Four);
/// Bytes of the block.
pub const BLOCK_LENGTH: Register = register("length", 12, Four);
/// Notifications: distance of the queues' addresses per unit of queue_notify_off.
pub const MULTIPLIER: Register = register("notify_off_multiplier", 16, Four);
/// Of the window: which BAR it shows.
pub const WINDOW_BAR: Register = BAR.rw(0xff);
/// Of the window: where in the BAR.
pub const WINDOW_OFFSET: Register = OFFSET.rw(0xffff_ffff);
/// Of the window: how many bytes to access: 1, 2 or 4.
pub const WINDOW_LENGTH: Register = BLOCK_LENGTH.rw(0xffff_ffff);
/// Of the window: what is read or written there.
pub const WINDOW_DATA: Register = register("pci_cfg_data", 16, Four).rw(0xffff_ffff);

/// What a capability points to: its cfg_type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Common configuration.
    Common = 1,
    /// Notifications.
    Notify = 2,
    /// ISR status.
    Isr = 3,
    /// Device configuration.
    Device = 4,
    /// Access to the BARs through configuration space.
    Window = 5,
}

const REGISTERS: &[&Register] = &[
    &capability::ID,
    &capability::NEXT,
    &LENGTH,
    &KIND,
    &BAR,
    &ID,
    &OFFSET,
    &BLOCK_LENGTH,
    &MULTIPLIER,
];
/// Those of every capability.
const COMMON: usize = 8;

/// A capability that points to a block.
pub const BLOCK: Block = Block {
    name: "Virtio",
    registers: REGISTERS.split_at(COMMON).0,
};

/// The one that points to notifications.
pub const NOTIFY: Block = Block {
    name: "Virtio notifications",
    registers: REGISTERS,
};

/// The window.
pub const WINDOW: Block = Block {
    name: "Virtio configuration access",
    registers: &[
        &capability::ID,
        &capability::NEXT,
        &LENGTH,
        &KIND,
        &WINDOW_BAR,
        &ID,
        &WINDOW_OFFSET,
        &WINDOW_LENGTH,
        &WINDOW_DATA,
    ],
};
