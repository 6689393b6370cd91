//! What a guest's writes leave behind in an overlay.

/// All that a guest's writes have left behind in an overlay: small, of fixed size, to be kept where
/// it outlives the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OverlayState {
    /// The command register as the guest wrote it.
    pub(super) command: u16,
}

impl OverlayState {
    /// As a number, for a file.
    pub const fn to_bits(self) -> u64 {
        self.command as u64
    }

    /// From such a number. Bits without a meaning are ignored.
    pub const fn from_bits(bits: u64) -> Self {
        Self {
            command: (bits & 0xffff) as u16,
        }
    }
}
