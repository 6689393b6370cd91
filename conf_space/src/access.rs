//! Access to the configuration space of one function.

use thiserror::Error;

/// Width of one access or of one register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Width {
    /// 1 byte.
    One,
    /// 2 bytes.
    Two,
    /// 4 bytes.
    Four,
}

impl Width {
    /// The width of `bytes` bytes; `None` unless 1, 2 or 4.
    pub const fn from_bytes(bytes: u32) -> Option<Self> {
        match bytes {
            1 => Some(Self::One),
            2 => Some(Self::Two),
            4 => Some(Self::Four),
            _ => None,
        }
    }

    /// Number of bytes: 1, 2 or 4.
    pub const fn bytes(self) -> u16 {
        match self {
            Self::One => 1,
            Self::Two => 2,
            Self::Four => 4,
        }
    }

    /// Whether `offset` is a multiple of the width.
    pub const fn is_aligned(self, offset: u16) -> bool {
        offset & self.bytes().wrapping_sub(1) == 0
    }

    /// A mask of all bits of a value of this width.
    pub const fn mask(self) -> u32 {
        match self {
            Self::One => 0xff,
            Self::Two => 0xffff,
            Self::Four => 0xffff_ffff,
        }
    }
}

/// Size of a function's configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConfigSize {
    /// 256 bytes: conventional PCI, or no memory-mapped configuration access on this machine.
    Conventional,
    /// 4096 bytes: PCI Express.
    Extended,
}

impl ConfigSize {
    /// Number of bytes: 256 or 4096.
    pub const fn bytes(self) -> u16 {
        match self {
            Self::Conventional => 256,
            Self::Extended => 4096,
        }
    }
}

/// Why an access to a configuration space did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AccessError {
    /// The device is no longer there: unplugged, or dead after a reset.
    #[error("the device is gone")]
    Gone,
    /// The platform forbids the access, for example by kernel lockdown.
    #[error("access to the configuration space is denied")]
    Denied,
    /// The access failed otherwise.
    #[error("access to the configuration space failed with errno {errno}")]
    Failed {
        /// The positive errno.
        errno: i32,
    },
}

/// The configuration space of one function, as its owner can reach it.
///
/// Values are in host byte order with byte `offset` in bits 7:0, and carry nothing above their
/// width. `offset` is a multiple of the width and within the function's [`ConfigSize`]; an
/// implementation answers anything else with an error. Each call is exactly one access of that
/// width: registers have side effects.
pub trait ConfigSpace {
    /// Reads `width` bytes at `offset`.
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError>;

    /// Writes the low `width` bytes of `value` at `offset`.
    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), AccessError>;
}
