//! What the frontend does when the backend's state changes.

use std::time::{Duration, Instant};

use super::{DIRECTORY, Frontend, FrontendError, Step, Variant};
use crate::state::XenbusState;
use crate::types::PciDevice;
use crate::xenstore::Store;

/// How long Mini-OS' closing may take each time that it waits for the backend. It itself has no limit.
const CLOSE_PATIENCE: Duration = Duration::from_secs(30);

impl Frontend {
    /// Reacts to the backend's next change of state, and gives that state; `None` when nothing changed in time.
    ///
    /// # Errors
    /// Those of what the change makes it do.
    pub fn follow(&mut self, timeout: Duration) -> Result<Option<XenbusState>, FrontendError> {
        let start = Instant::now();
        loop {
            if self.store.next_event()?.is_some() {
                let state = self.backend_state()?;
                self.report(Step::Backend(state));
                self.react(state)?;
                return Ok(Some(state));
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            self.wait_for_event(left)?;
        }
    }

    /// Reacts to the backend's changes of state until it has come to `awaited`, and has reacted to that too.
    ///
    /// # Errors
    /// [`FrontendError::BackendState`] when it does not come there in time, or closes instead.
    pub fn wait_for_backend(
        &mut self,
        awaited: XenbusState,
        timeout: Duration,
    ) -> Result<(), FrontendError> {
        let start = Instant::now();
        loop {
            let followed = self.follow(timeout.saturating_sub(start.elapsed()))?;
            if followed == Some(awaited) {
                return Ok(());
            }
            let closing = matches!(followed, Some(XenbusState::Closing | XenbusState::Closed));
            if closing || followed.is_none() {
                let state = self.backend_state()?;
                return Err(FrontendError::BackendState {
                    awaited,
                    state,
                    waited: start.elapsed(),
                });
            }
        }
    }

    /// Whether it answers when the backend is about to add or remove devices. A frontend that does not makes the toolstack wait.
    pub fn set_answers_reconfiguring(&mut self, answers: bool) {
        self.answers_reconfiguring = answers;
    }

    fn react(&mut self, backend: XenbusState) -> Result<(), FrontendError> {
        let panics = matches!(
            backend,
            XenbusState::Closed | XenbusState::Reconfiguring | XenbusState::Reconfigured
        );
        if self.variant == Variant::NetBsd && panics {
            return Err(FrontendError::Panicked(backend));
        }
        match backend {
            XenbusState::Unknown
            | XenbusState::Initialising
            | XenbusState::InitWait
            | XenbusState::Initialised => Ok(()),
            XenbusState::Connected if self.state == XenbusState::Initialised => self.connected(),
            XenbusState::Connected => Ok(()),
            XenbusState::Closing | XenbusState::Closed => self.backend_closes(backend),
            XenbusState::Reconfiguring if self.answers_reconfiguring => self.reconfiguring(),
            XenbusState::Reconfigured if self.answers_reconfiguring => self.reconfigured(),
            XenbusState::Reconfiguring | XenbusState::Reconfigured => Ok(()),
        }
    }

    fn backend_closes(&mut self, backend: XenbusState) -> Result<(), FrontendError> {
        let open = !matches!(self.state, XenbusState::Closing | XenbusState::Closed);
        match self.variant {
            Variant::Linux | Variant::LinuxOld if open => {
                self.forget_functions();
                self.set_state(XenbusState::Closed)
            }
            Variant::NetBsd => self.set_state(XenbusState::Closed),
            Variant::FreeBsd if open => self.set_state(XenbusState::Closing),
            // While it has yet to be connected, it goes back to waiting instead.
            Variant::MiniOs
                if backend == XenbusState::Closing
                    && open
                    && self.state != XenbusState::Initialised =>
            {
                self.close(CLOSE_PATIENCE)
            }
            _ => Ok(()),
        }
    }

    /// State 7: devices that are to go are let go, and then that is said.
    fn reconfiguring(&mut self) -> Result<(), FrontendError> {
        match (self.variant, self.state) {
            (Variant::Linux | Variant::LinuxOld, XenbusState::Connected) => {
                for address in self.departing()? {
                    self.remove_function(address);
                }
                self.set_state(XenbusState::Reconfiguring)
            }
            // It has missed that the backend was connected; the scan comes with state 8.
            (Variant::Linux, XenbusState::Initialised) | (Variant::MiniOs, _) => {
                self.set_state(XenbusState::Reconfiguring)
            }
            _ => Ok(()),
        }
    }

    /// State 8: new devices are looked for.
    fn reconfigured(&mut self) -> Result<(), FrontendError> {
        match self.variant {
            Variant::Linux | Variant::LinuxOld if self.state == XenbusState::Reconfiguring => {
                self.scan()?;
                self.set_state(XenbusState::Connected)
            }
            Variant::MiniOs => {
                self.set_state(XenbusState::Connected)?;
                self.scan()
            }
            _ => Ok(()),
        }
    }

    /// The devices that the toolstack has marked for removal.
    fn departing(&mut self) -> Result<Vec<PciDevice>, FrontendError> {
        let mut found = Vec::new();
        for index in 0..self.device_count()? {
            let state = self
                .store
                .read_state(&format!("{}/state-{index}", self.backend))?;
            if state == XenbusState::Closing {
                found.extend(self.read_device("vdev", index)?);
            }
        }
        Ok(found)
    }

    /// Writes anything as its state.
    ///
    /// # Errors
    /// [`FrontendError::Xenstore`].
    pub fn write_state(&mut self, text: &str) -> Result<(), FrontendError> {
        self.state = XenbusState::parse(text.as_bytes());
        Ok(self.store.write(&format!("{DIRECTORY}/state"), text)?)
    }
}
