//! The feature bits that devices and drivers agree on.

bitflags::bitflags! {
    /// Feature bits (virtio 1.3, section 6). The ones that belong to rings and transports are named
    /// here; bits 0 to 23 and from 50 on mean what the device type says, so they are named there,
    /// and kept here as they are.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Features: u64 {
        /// Legacy: the driver is to be told when the rings run empty. Never offered.
        const NOTIFY_ON_EMPTY = 1 << 24;
        /// Legacy: any layout of a request's parts into descriptors will do.
        const ANY_LAYOUT = 1 << 27;
        /// A descriptor may refer to a table of descriptors.
        const INDIRECT_DESC = 1 << 28;
        /// Notifications are asked for by ring index.
        const EVENT_IDX = 1 << 29;
        /// Virtio 1.0 or later.
        const VERSION_1 = 1 << 32;
        /// Addresses go through what the platform has between devices and memory.
        const ACCESS_PLATFORM = 1 << 33;
        /// Packed virtqueues.
        const RING_PACKED = 1 << 34;
        /// Buffers are used in the order in which they were made available.
        const IN_ORDER = 1 << 35;
        /// Memory ordering is the platform's.
        const ORDER_PLATFORM = 1 << 36;
        /// The device has virtual functions.
        const SR_IOV = 1 << 37;
        /// A notification says how far the driver has come.
        const NOTIFICATION_DATA = 1 << 38;
        /// A queue's notification is told apart by data that the device chose.
        const NOTIF_CONFIG_DATA = 1 << 39;
        /// One queue can be reset while the others go on.
        const RING_RESET = 1 << 40;
        /// What the device type says.
        const _ = !0;
    }
}
