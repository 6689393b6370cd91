//! What is remembered of a device's errors.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::host::errors::Severity;

/// As it lies in the record.
#[repr(C)]
#[derive(Debug)]
pub struct Errors {
    /// How the recovery is going, as a number.
    recovery: AtomicU32,
    /// The worst error that was reported and that the session has not taken up yet; 0: none.
    reported: AtomicU32,
    /// Errors since the device was hidden, by severity.
    counts: [AtomicU32; Severity::COUNT],
    /// How often an IOMMU has stopped its DMA since it was hidden.
    stopped: AtomicU32,
}

impl Errors {
    /// How the recovery from an error is going, as a number.
    pub fn recovery(&self) -> u32 {
        self.recovery.load(Ordering::Acquire)
    }

    /// Keeps that number.
    pub fn set_recovery(&self, bits: u32) {
        self.recovery.store(bits, Ordering::Release);
    }

    /// Counts an error.
    pub fn count(&self, severity: Severity) {
        if let Some(count) = self.counts.get(severity.index()) {
            count.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Errors of that severity since the device was hidden.
    pub fn counted(&self, severity: Severity) -> u32 {
        self.counts
            .get(severity.index())
            .map_or(0, |count| count.load(Ordering::Acquire))
    }

    /// Counts DMA that an IOMMU has stopped.
    pub fn count_stopped(&self) {
        self.stopped.fetch_add(1, Ordering::AcqRel);
    }

    /// How often an IOMMU has stopped DMA of the device since it was hidden, as far as the kernel has told.
    pub fn stopped(&self) -> u32 {
        self.stopped.load(Ordering::Acquire)
    }

    /// Has the session recover from an error; the worst counts.
    pub fn report(&self, severity: Severity) {
        self.reported.fetch_max(severity as u32, Ordering::AcqRel);
    }

    /// The error that the session has not taken up yet.
    pub fn reported(&self) -> Option<Severity> {
        Severity::from_number(self.reported.load(Ordering::Acquire))
    }

    /// The session has taken that one up. A worse one that came meanwhile stays.
    pub fn take(&self, severity: Severity) {
        // Failure means that a worse one came.
        let _ =
            self.reported
                .compare_exchange(severity as u32, 0, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Forgets what was to be recovered from, but not what was counted.
    pub fn forget(&self) {
        self.reported.store(0, Ordering::Release);
        self.set_recovery(0);
    }
}
