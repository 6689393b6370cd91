//! Taking a device that does not recover from a guest that does not answer.

use std::time::{Duration, Instant};

use log::warn;
use xenbus::XenbusState;

use super::recovery::State;
use crate::session::states::{Peer, View};
use crate::session::{Session, SessionError, nodes};

/// A frontend that lives answers the toolstack sooner; libxl waits for 10 s.
const GRACE: Duration = Duration::from_secs(5);

impl Session {
    /// Takes the devices away that the toolstack takes from the guest, if all of them have failed to recover and the frontend has had its
    /// time to let go of them. True: it is done, and the toolstack is to be shown that.
    pub(in crate::session) fn take_failed_devices(
        &mut self,
        view: &View,
    ) -> Result<bool, SessionError> {
        let unanswered = view.backend == XenbusState::Reconfiguring
            && view.frontend == XenbusState::Connected
            && view.peer == Peer::Frontend;
        if !unanswered || !self.only_failed_devices_leave()? {
            self.removal_due = None;
            return Ok(false);
        }
        let now = Instant::now();
        let due = *self
            .removal_due
            .get_or_insert(now.checked_add(GRACE).unwrap_or(now));
        if now < due {
            return Ok(false);
        }
        self.removal_due = None;
        warn!(
            "domain {}: its frontend does not let go of a device that failed; it is taken away all the same",
            self.setup.domain
        );
        self.reconfigure()?;
        Ok(true)
    }

    fn only_failed_devices_leave(&mut self) -> Result<bool, SessionError> {
        let failed: Vec<_> = self
            .exports
            .iter()
            .filter(|export| matches!(export.recovery().state, State::Failed(_)))
            .map(|export| export.device.bdf)
            .collect();
        if failed.is_empty() {
            return Ok(false);
        }
        let mut leaves = false;
        for node in nodes::devices(&mut self.store, &self.paths)? {
            match (node.state, node.address) {
                (XenbusState::Closing, Ok(bdf)) if failed.contains(&bdf) => leaves = true,
                (XenbusState::Closing | XenbusState::Initialising, _) => return Ok(false),
                _ => {}
            }
        }
        Ok(leaves)
    }
}
