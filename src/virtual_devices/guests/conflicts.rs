//! Slots that QEMU has a function in, too. Whoever gives a guest devices before it starts asks QEMU about them (`pciback create`, `pciback virtio
//! add`). Where xl starts a guest by itself it asks nobody, and goes on: then it is told what the guest sees.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use log::{debug, error};
use xenbus::DomId;

use super::{VirtualGuests, lock};
use crate::config::Slot;
use crate::text::printable;
use crate::virtual_devices::place::{At, place};
use crate::virtual_devices::qemu::{self, Function};
use crate::virtual_devices::record;

/// How often is looked whether QEMU listens.
const LOOK: Duration = Duration::from_millis(100);
/// After this time a guest that is still paused has no QEMU.
const PATIENCE: Duration = Duration::from_secs(60);

impl VirtualGuests {
    /// What QEMU has in the first of these slots that it has, too.
    ///
    /// # Errors
    /// It gives no answer.
    pub(in crate::virtual_devices) fn conflict(
        domain: DomId,
        mut ours: impl FnMut(Slot) -> bool,
    ) -> io::Result<Option<Function>> {
        let mut theirs = qemu::functions(&qemu::socket(domain))?.into_iter();
        Ok(theirs.find(|function| Slot::new(function.slot).is_ok_and(&mut ours)))
    }

    /// Has QEMU asked about the slots of a new guest's devices, as soon as it listens, by a thread of its own.
    pub(super) fn look_for_conflicts(self: &Arc<Self>, domain: DomId) {
        let guests = Arc::clone(self);
        let look = move || {
            if !guests.qemu_listens(domain) {
                return;
            }
            let record = guests.record_of(domain);
            let devices = record.map(|record| record::devices_of(&record));
            let devices = devices.unwrap_or_default();
            let seats = place(&devices).unwrap_or_default();
            let is_ours = |slot| seats.iter().any(|(seat, _)| seat.at() == At::Pci(slot));
            match Self::conflict(domain, is_ours) {
                Ok(None) => {}
                Ok(Some(function)) => guests.tell_of_conflict(domain, &function),
                Err(why) => debug!("domain {domain}: QEMU does not say which slots it has: {why}"),
            }
        };
        let thread = thread::Builder::new().name(format!("virtio qemu {domain}"));
        if let Err(error) = thread.spawn(look) {
            debug!("domain {domain}: no thread to ask QEMU which slots it has: {error}");
        }
    }

    /// Waits until QEMU listens. False: that does not come.
    fn qemu_listens(&self, domain: DomId) -> bool {
        let begun = Instant::now();
        while !fs::exists(qemu::socket(domain)).unwrap_or(false) {
            let waits = begun.elapsed() < PATIENCE
                && !self.turns.is_closed()
                && self.may_be_equipped(domain);
            if !waits {
                return false;
            }
            thread::sleep(LOOK);
        }
        true
    }

    fn tell_of_conflict(&self, domain: DomId, function: &Function) {
        let name = lock(&self.sessions)
            .get(&domain)
            .map(|session| session.name.clone());
        let why = format!(
            "slot {:02x} is taken by QEMU ({}), whose device the guest sees: give ours another slot, and create the guest anew",
            function.slot,
            printable(&function.what)
        );
        error!(
            "domain {domain} ({}): {why}",
            printable(&name.unwrap_or_default())
        );
        lock(&self.conflicts).insert(domain, why);
    }
}
