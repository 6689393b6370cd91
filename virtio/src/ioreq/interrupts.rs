//! The way back: interrupts of targets, sent through Xen.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use xenbus::device_model::{DeviceModel, IntxPin};
use xenbus::{DomId, XenError};

use crate::transport::InterruptSink;

/// Time between two lines in the log about interrupts that cannot be sent. A guest can bring that about
/// with messages that are none.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// The interrupts of one device of a guest.
#[derive(Debug)]
pub struct DomainInterrupts {
    xen: Arc<dyn DeviceModel>,
    domain: DomId,
    pin: IntxPin,
    complained: Mutex<Option<Instant>>,
}

impl DomainInterrupts {
    /// Those of a device whose line is `pin`: a PCI function's own, or, for a device elsewhere, one
    /// that no function has.
    pub fn new(xen: Arc<dyn DeviceModel>, domain: DomId, pin: IntxPin) -> Self {
        Self {
            xen,
            domain,
            pin,
            complained: Mutex::default(),
        }
    }

    fn check(&self, result: Result<(), XenError>) {
        let Err(error) = result else { return };
        let mut complained = self
            .complained
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if complained.is_none_or(|at| at.elapsed() >= COMPLAINT_INTERVAL) {
            *complained = Some(Instant::now());
            let slot = self.pin.device;
            log::warn!(
                "domain {}: an interrupt of the device with the line of slot {slot:#x} is lost: {error}",
                self.domain
            );
        }
    }
}

impl InterruptSink for DomainInterrupts {
    fn msi(&self, address: u64, data: u32) {
        self.check(self.xen.inject_msi(self.domain, address, data));
    }

    fn intx(&self, level: bool) {
        self.check(self.xen.set_pci_intx_level(self.domain, self.pin, level));
    }
}
