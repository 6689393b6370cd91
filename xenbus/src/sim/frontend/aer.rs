//! Error recovery: the backend asks, the frontend's driver answers.

use std::time::{Duration, Instant};

use super::{Frontend, FrontendError};
use crate::pciif::{AerCommand, AerResult};
use crate::types::PciDevice;

/// A step of recovery that the backend asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AerRequest {
    /// The step; `None` for a number that is none.
    pub command: Option<AerCommand>,
    /// The state of the way to the device, a [`crate::pciif::ChannelState`] by its number.
    pub state: i32,
    /// The function's virtual address.
    pub function: PciDevice,
}

impl Frontend {
    /// Waits for the backend to ask for a step of recovery; `None` when it does not in time. Until [`Frontend::answer_aer`] the function can
    /// be accessed as ever, as a driver does that recovers.
    ///
    /// # Errors
    /// [`FrontendError::NotPublished`], [`FrontendError::Port`].
    pub fn next_aer(&mut self, timeout: Duration) -> Result<Option<AerRequest>, FrontendError> {
        let start = Instant::now();
        let link = self.link()?;
        loop {
            // Looked for first: an operation may have taken the event.
            if let Some(request) = link.page.aer_request() {
                let function = PciDevice {
                    segment: u16::try_from(request.domain).unwrap_or(u16::MAX),
                    bus: u8::try_from(request.bus).unwrap_or(u8::MAX),
                    devfn: u8::try_from(request.devfn).unwrap_or(u8::MAX),
                };
                return Ok(Some(AerRequest {
                    command: AerCommand::from_number(request.cmd),
                    state: request.err,
                    function,
                }));
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            link.port.wait(left)?;
        }
    }

    /// Answers the step.
    ///
    /// # Errors
    /// [`FrontendError::NotPublished`], [`FrontendError::Port`].
    pub fn answer_aer(&mut self, result: AerResult) -> Result<(), FrontendError> {
        let link = self.link()?;
        link.page.answer_aer(result);
        Ok(link.port.notify()?)
    }
}
