//! Control messages (virtio 1.3, section 5.3.6.2).

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct virtio_console_control`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Message {
    /// The port.
    pub port: U32,
    pub event: U16,
    pub value: U16,
}

/// The driver is ready for ports, or has failed.
pub(super) const DEVICE_READY: u16 = 0;
/// There is a port.
pub(super) const PORT_ADD: u16 = 1;
/// The driver is ready for this port, or has failed.
pub(super) const PORT_READY: u16 = 3;
/// The port is a console.
pub(super) const CONSOLE_PORT: u16 = 4;
/// Somebody has opened the other end, or closed it.
pub(super) const PORT_OPEN: u16 = 6;
/// The name follows.
pub(super) const PORT_NAME: u16 = 7;

impl Message {
    pub fn new(port: usize, event: u16, value: bool) -> Self {
        Self {
            port: (port as u32).into(),
            event: event.into(),
            value: u16::from(value).into(),
        }
    }
}
