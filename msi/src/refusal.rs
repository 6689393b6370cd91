//! Why an interrupt is not enabled, and what the guest is told.

use conf_space::AccessError;
use thiserror::Error;
use xenbus::XenError;
use xenbus::pciif::PciError;

use crate::Kind;
use crate::interrupts::BrokenMsiX;

/// Why an interrupt is not enabled.
#[derive(Debug, Error)]
pub enum Refusal {
    /// The device does not have it.
    #[error("the device has no {0}")]
    None(Kind),
    /// The device has MSI-X that cannot be used.
    #[error("MSI-X of this device is not used")]
    Broken(#[source] BrokenMsiX),
    /// The other kind is on.
    #[error("{0} is on")]
    OtherIsOn(Kind),
    /// It is on, but not through us: somebody has set the bit in configuration space.
    #[error(
        "{0} was switched on by a write to its capability, and must be switched off the same way"
    )]
    IsOn(Kind),
    /// More entries than an operation can hold.
    #[error("{count} entries are more than the 128 that one operation can have")]
    TooMany {
        /// Asked for.
        count: u32,
    },
    /// No number of MSI vectors that this device can have.
    #[error("{count} vectors: the device can have a power of two up to {most}")]
    Count {
        /// Asked for.
        count: u32,
        /// The device's most.
        most: u8,
    },
    /// No entry is asked for, one twice, or one that the table does not have.
    #[error("the entries are none, not all different, or beyond the table's {table}")]
    Entries {
        /// Length of the table.
        table: u16,
    },
    /// More entries than the table has.
    #[error("{count} entries are more than the table's {table}")]
    TableTooShort {
        /// Asked for.
        count: u16,
        /// Length of the table.
        table: u16,
    },
    /// Xen needs to reach the table: memory decode must be on, for a virtual function that of its
    /// physical function.
    #[error("memory decode is off")]
    MemoryDecodeOff,
    /// The device is asleep.
    #[error("the device is in a low power state")]
    Asleep,
    /// A PIRQ that does not fit where frontends expect it, in 16 bits, or is 0, which for them is
    /// none.
    #[error("Xen gave PIRQ {pirq}, which frontends cannot be told")]
    Unspeakable {
        /// The PIRQ, unmapped again.
        pirq: u32,
    },
    /// Xen refused. Everything mapped until then is unmapped.
    #[error("Xen refused")]
    Xen(#[source] XenError),
    /// What the device held before cannot be given back.
    #[error("what is on cannot be switched off first")]
    Cleanup(
        #[from]
        #[source]
        CleanupError,
    ),
    /// The device's configuration space cannot be used. Everything mapped is unmapped.
    #[error("cannot use the device's configuration space")]
    Config(
        #[from]
        #[source]
        AccessError,
    ),
}

/// What could not be undone. The ledger keeps it, and the next operation tries again.
#[derive(Debug, Error)]
pub enum CleanupError {
    /// Xen does not take a PIRQ back.
    #[error("Xen does not take a PIRQ back")]
    Xen(#[source] XenError),
    /// The enable bit cannot be cleared. The PIRQs are unmapped, so that Xen lets nothing through.
    #[error("cannot switch the interrupt off in the device's configuration space")]
    Config(#[source] AccessError),
}

/// What the guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// `op.err`.
    pub error: PciError,
    /// `op.value`.
    pub value: u32,
}

// The errors that frontends know from enabling MSI-X, as positive errnos of Linux.
const ENXIO: i32 = 6;
const ENOMEM: i32 = 12;
const ENODEV: i32 = 19;
const EINVAL: i32 = 22;
const ENOSPC: i32 = 28;
const ENODATA: i32 = 61;
const EALREADY: i32 = 114;

impl Refusal {
    /// The answer to `enable_msi` and `enable_multi_msi`. Its value is a smaller number of vectors
    /// that may be had, or 0.
    pub fn msi_answer(&self) -> Answer {
        let value = match *self {
            Self::Count { count, most } if count > 1 => fewer(count, most),
            _ => 0,
        };
        Answer {
            error: PciError::OP_FAILED,
            value,
        }
    }

    /// The answer to `enable_msix` for `count` entries. A request that is not even tried has its
    /// value back; one that fails has the error.
    pub fn msix_answer(&self, count: u32) -> Answer {
        let untried = |errno| Answer {
            error: PciError::from_errno(errno),
            value: count,
        };
        let failed = |error: PciError| Answer {
            error,
            value: error.0.cast_unsigned(),
        };
        match self {
            Self::TooMany { .. } => untried(EINVAL),
            Self::IsOn(_) => untried(EALREADY),
            Self::OtherIsOn(_) | Self::MemoryDecodeOff => untried(ENXIO),
            Self::None(_)
            | Self::Broken(_)
            | Self::Count { .. }
            | Self::Entries { .. }
            | Self::Asleep => failed(PciError::from_errno(EINVAL)),
            Self::TableTooShort { .. } | Self::Unspeakable { .. } => {
                failed(PciError::from_errno(ENOSPC))
            }
            Self::Xen(error) => failed(match error.errno() {
                Some(ENODEV | ENODATA) => PciError::from_errno(ENXIO),
                Some(errno @ (ENXIO | ENOMEM | EINVAL | ENOSPC)) => PciError::from_errno(errno),
                _ => PciError::OP_FAILED,
            }),
            Self::Config(_) | Self::Cleanup(_) => failed(PciError::OP_FAILED),
        }
    }
}

/// The largest number of vectors below `count` that the device can have.
fn fewer(count: u32, most: u8) -> u32 {
    let below = count.wrapping_sub(1).min(u32::from(most));
    below
        .checked_ilog2()
        .map_or(0, |bits| 1u32.wrapping_shl(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msix_refusals_are_what_frontends_know() {
        for (refusal, error, value) in [
            (Refusal::TooMany { count: 129 }, -22, 129),
            (Refusal::IsOn(Kind::MsiX), -114, 129),
            (Refusal::OtherIsOn(Kind::Msi), -6, 129),
            (Refusal::MemoryDecodeOff, -6, 129),
            (Refusal::None(Kind::MsiX), -22, 0xffff_ffea),
            (Refusal::Entries { table: 3 }, -22, 0xffff_ffea),
            (Refusal::Asleep, -22, 0xffff_ffea),
            (
                Refusal::TableTooShort { count: 4, table: 3 },
                -28,
                0xffff_ffe4,
            ),
            (
                Refusal::Xen(XenError::from_errno("map", 28)),
                -28,
                0xffff_ffe4,
            ),
            (
                Refusal::Xen(XenError::from_errno("map", 12)),
                -12,
                0xffff_fff4,
            ),
            (
                Refusal::Xen(XenError::from_errno("map", 61)),
                -6,
                0xffff_fffa,
            ),
        ] {
            let answer = refusal.msix_answer(129);
            assert_eq!((answer.error.0, answer.value), (error, value), "{refusal}");
        }
    }

    #[test]
    fn an_errno_that_frontends_do_not_know_does_not_reach_them() {
        for errno in [1, 2, 3, 4, 5, 17, 38] {
            let answer = Refusal::Xen(XenError::from_errno("map", errno)).msix_answer(1);
            assert_eq!(answer.error, PciError::OP_FAILED);
        }
    }

    #[test]
    fn every_msi_refusal_is_op_failed_and_names_fewer_vectors_where_they_may_be_had() {
        for (count, most, value) in [
            (8, 4, 4),
            (3, 4, 2),
            (32, 1, 1),
            (2, 1, 1),
            (0, 4, 0),
            (u32::MAX, 32, 32),
        ] {
            let answer = Refusal::Count { count, most }.msi_answer();
            assert_eq!(
                (answer.error, answer.value),
                (PciError::OP_FAILED, value),
                "{count} of {most}"
            );
        }
        let answer = Refusal::OtherIsOn(Kind::MsiX).msi_answer();
        assert_eq!((answer.error, answer.value), (PciError::OP_FAILED, 0));
    }
}
