//! Notifications on PCI (virtio 1.3, section 4.1.4.4).

use super::core::Core;

/// Distance of the queues' notification addresses in memory, in bytes.
pub(crate) const MULTIPLIER: u32 = 4;

/// The driver writes `value` at `offset` of the notification structure. With a `multiplier` of 0 all
/// queues have the same address, and the value says which is meant; it is the queue's number
/// whether or not the driver adds more above it (VIRTIO_F_NOTIFICATION_DATA).
pub(crate) fn write(core: &mut Core, multiplier: u32, offset: u64, value: u32) {
    let queue = match offset.checked_div(multiplier.into()) {
        Some(index) => u16::try_from(index).ok(),
        None => Some((value & 0xffff) as u16),
    };
    if let Some(queue) = queue {
        core.notify(queue);
    }
}
