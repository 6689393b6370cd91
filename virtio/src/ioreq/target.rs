//! What an address space holds.

use std::fmt::Debug;

use conf_space::Width;
use xenbus::PciDevice;
use xenbus::device_model::IoRange;

use crate::inspect::DeviceView;

/// One of the doors at which a target is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Window {
    /// The configuration space of a PCI function. Offsets are below 4096; on x86 below 256, but for
    /// AMD's extended port access.
    Config,
    /// Memory or ports: a base address register of this number, or, where there is only one window,
    /// 0.
    Region(u8),
}

/// Addresses that a target answers, all of them by one window. The range's first address is
/// offset 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Addresses.
    pub range: IoRange,
    /// How they are answered.
    pub window: Window,
}

/// What answers a guest's accesses: a PCI function, or a virtio-mmio window.
///
/// All that arrives here comes from a guest. The offset is that of the access's first byte and lies
/// within the window; the access may be unaligned, and its end may lie beyond the window's. Values
/// have the byte at `offset` in bits 7:0 and carry nothing above their width. An access of 8 bytes
/// arrives as two of 4, lower half first; a string instruction as its elements.
///
/// The guest's CPU waits until the call returns, and so do its other CPUs if they access a device: nothing
/// here may wait for anything. A CPU that is to wait by itself is held ([`Target::holds`]).
pub trait Target: Send + Debug {
    /// Reads. What is not there reads as all ones in the target's own view of the matter: zero for
    /// a reserved register, all ones beyond the end.
    fn read(&mut self, window: Window, offset: u64, width: Width) -> u32;

    /// Writes.
    fn write(&mut self, window: Window, offset: u64, width: Width, value: u32);

    /// Whether the CPU that has written there is not to go on for now: the driver counts on the end of what it has begun, as legacy
    /// ones do that free their memory after a reset. Asked after each write, and again every now and then until the CPU may go on, which
    /// is to be within a second or so. Other CPUs are served meanwhile.
    fn holds(&mut self, _window: Window, _offset: u64) -> bool {
        false
    }

    /// Adds to `claims` what it answers now, but for configuration space: see [`Placed`]. Only a write
    /// to [`Window::Config`] may change that.
    fn claims(&self, claims: &mut Vec<Claim>);

    /// Has it stop for good. True: nothing of it touches the guest's memory any more. To be asked again
    /// until then.
    fn halt(&mut self) -> bool {
        true
    }

    /// What there is to see of its devices.
    fn inspect(&self) -> Vec<DeviceView> {
        Vec::new()
    }
}

/// A target in its place.
#[derive(Debug)]
pub struct Placed {
    /// For a PCI function, where it is on the bus.
    pub function: Option<PciDevice>,
    /// The target.
    pub target: Box<dyn Target>,
}

impl Placed {
    /// Adds all claims, of configuration space, too.
    pub(super) fn claims(&self, claims: &mut Vec<Claim>) {
        if let Some(function) = self.function {
            claims.push(Claim {
                range: IoRange::config(function),
                window: Window::Config,
            });
        }
        self.target.claims(claims);
    }
}
