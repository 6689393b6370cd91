//! Devices that are removed from the machine while they are hidden, or a guest's: pulled out, or virtual functions whose physical function
//! lost its driver, or was told by somebody else to have none.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Device, Devices};
use crate::host::record::Phase;

const REMOVED: &str = "it was removed from this machine while the guest had it";

impl Devices {
    /// Looks which hidden devices were removed, on a thread of its own: a device that is being reset keeps everybody waiting.
    pub fn look_for_removed(self: &Arc<Self>) {
        if self.looks.fetch_add(1, Ordering::AcqRel) > 0 {
            // Whoever is looking will look once more.
            return;
        }
        self.spawn("removed devices".to_owned(), |devices| {
            let mut asked = devices.looks.load(Ordering::Acquire);
            loop {
                devices.forget_removed();
                match devices
                    .looks
                    .compare_exchange(asked, 0, Ordering::AcqRel, Ordering::Acquire)
                {
                    Ok(_) => return,
                    Err(more) => asked = more,
                }
            }
        })
        .unwrap_or_else(|error| {
            self.looks.store(0, Ordering::Release);
            log::error!(
                "devices may have been removed, and no thread can be started to look ({error})"
            );
        });
    }

    fn forget_removed(self: &Arc<Self>) {
        for device in self.list() {
            match device.record.phase() {
                Some(Phase::Hidden | Phase::Dead) if device.is_removed() => self.forget(&device),
                Some(Phase::Assigned) if device.is_removed() => self.tell_of_removal(&device),
                // Whoever is at work on it finds out.
                _ => {}
            }
        }
    }

    fn tell_of_removal(&self, device: &Device) {
        if device.withdrawn().is_some() {
            return;
        }
        let (bdf, owner) = (device.bdf, device.record.owner());
        let domain = owner.map_or_else(String::new, |owner| owner.domain.to_string());
        log::error!(
            "{bdf} was removed from this machine while domain {domain} has it; take it away from there, too: xl pci-detach {domain} {bdf}"
        );
        if msi::Held::read(device.record.msi()).is_some() {
            log::error!(
                "{bdf}: domain {domain} had interrupts of it, and Xen may panic when the guest lets go of them or ends: before that, bring the other guests of this host to safety. Virtual functions are taken away in safety by 'pciback vf destroy'"
            );
        }
        self.withdraw(device, REMOVED);
    }

    /// Has its guest's session let go of a device, with or without the guest's consent.
    pub fn withdraw(&self, device: &Device, why: &'static str) {
        *device.withdrawal() = Some(why);
        self.wake();
    }

    /// A device that is no more is neither dom0's nor hidden.
    pub(super) fn forget(self: &Arc<Self>, device: &Device) {
        let bdf = device.bdf;
        {
            // The next device at its address has a record of the same name.
            let mut table = self.table();
            let same = |known: &Arc<Device>| std::ptr::eq(Arc::as_ptr(known), device);
            if !table.hidden.get(&bdf).is_some_and(same) {
                return;
            }
            table.hidden.remove(&bdf);
            if let Err(error) = device.record.remove() {
                log::error!("{}", crate::text::chain(&error));
            }
        }
        self.bus.forget(bdf);
        log::warn!("{bdf} was hidden and was removed from this machine; it is forgotten");
        // A guest may be waiting for it.
        self.wake();
        self.keep_functions_beside(device);
    }
}
