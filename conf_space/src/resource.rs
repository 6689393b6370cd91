//! What a base address register decodes.

use bitflags::bitflags;

bitflags! {
    /// Kind of a resource.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct ResourceFlags: u8 {
        /// I/O ports.
        const IO = 1 << 0;
        /// Memory.
        const MEMORY = 1 << 1;
        /// Memory behind a 64-bit BAR, which takes the next BAR for its upper half.
        const MEMORY_64 = 1 << 2;
        /// Memory whose reads have no side effects.
        const PREFETCHABLE = 1 << 3;
    }
}

/// One address range of a function, as the host has placed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Resource {
    /// First host address (memory) or port (I/O).
    pub start: u64,
    /// Size in bytes or ports; 0: there is no such resource.
    pub size: u64,
    /// Kind.
    pub flags: ResourceFlags,
}

impl Resource {
    /// No resource: its BAR reads as zero.
    pub const ABSENT: Self = Self {
        start: 0,
        size: 0,
        flags: ResourceFlags::empty(),
    };

    /// Whether there is a resource at all.
    pub const fn is_present(&self) -> bool {
        self.size != 0
    }

    /// Whether it is I/O ports.
    pub const fn is_io(&self) -> bool {
        self.is_present() && self.flags.contains(ResourceFlags::IO)
    }

    /// Whether it is memory.
    pub const fn is_memory(&self) -> bool {
        self.is_present() && self.flags.contains(ResourceFlags::MEMORY)
    }

    /// Whether its BAR has an upper half in the next BAR.
    pub const fn is_64_bit(&self) -> bool {
        self.is_memory() && self.flags.contains(ResourceFlags::MEMORY_64)
    }
}
