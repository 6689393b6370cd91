//! Who has what a device shares its INTx line or a memory page with.

use std::sync::{MutexGuard, PoisonError};

use conf_space::registers::header::{self, command};
use conf_space::{AccessError, ConfigSpace};
use xenbus::DomId;

use super::{Device, DeviceError, Devices, Line};
use crate::host::HostError;
use crate::host::record::Phase;
use crate::host::sharing::{Hidden, Holder, Neighbour, Shared, in_pages, neighbours, on_line};

/// What a device shares with devices of others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sharing {
    /// Its INTx line, with whom. `what` is the GSI.
    pub line: Vec<Shared<u32>>,
    /// Memory pages, with whom. `what` is the first such page's address.
    pub pages: Vec<Shared<u64>>,
}

impl Devices {
    /// Held from before it is looked who has what a device shares with others until the device has changed hands: of two that share a page, both
    /// would be nobody's otherwise, and two guests get one each.
    pub fn admission(&self) -> MutexGuard<'_, ()> {
        let admission = self.admission.lock();
        admission.unwrap_or_else(PoisonError::into_inner)
    }

    /// What a device that `domain` is to have shares with devices of others.
    ///
    /// # Errors
    /// When the bus cannot be listed.
    pub fn sharing(&self, device: &Device, domain: DomId) -> Result<Sharing, HostError> {
        let neighbours = self.neighbours(device)?;
        let description = &device.description;
        Ok(Sharing {
            line: on_line(description.irq, Some(domain), &neighbours),
            pages: in_pages(&description.identity.resources, Some(domain), &neighbours),
        })
    }

    /// Refuses to give a device back to dom0 that has memory in a page with a guest's, unless that is allowed.
    pub(super) fn check_pages(&self, device: &Device) -> Result<(), DeviceError> {
        if self.settings(device).allow_shared_pages {
            return Ok(());
        }
        let mut neighbours = self.neighbours(device)?;
        neighbours.retain(|other| matches!(other.holder, Holder::Guest(_)));
        let shared = in_pages(&device.description.identity.resources, None, &neighbours);
        match shared.first() {
            None => Ok(()),
            Some(shared) => Err(DeviceError::SharedPage {
                bdf: device.bdf,
                page: shared.what,
                with: shared.to_string(),
            }),
        }
    }

    fn neighbours(&self, device: &Device) -> Result<Vec<Neighbour>, HostError> {
        let hidden = |other| {
            let hidden = self.get(other)?;
            // One that is being given back is dom0's.
            (hidden.record.phase() != Some(Phase::Returning)).then(|| Hidden {
                owner: hidden.owner(),
                without_intx: hidden.line() == Line::Refused,
            })
        };
        Ok(neighbours(self.bus.survey()?, device.bdf, hidden))
    }
}

/// Keeps a device off its INTx line. `false`: it does not have the bit for that, as before PCI 2.3.
///
/// # Errors
/// When configuration space cannot be reached.
pub fn silence(config: &dyn ConfigSpace) -> Result<bool, AccessError> {
    let (offset, width) = (header::COMMAND.offset, header::COMMAND.width);
    let off = u32::from(command::INTX_DISABLE);
    let now = config.read(offset, width)?;
    if now & off != 0 {
        return Ok(true);
    }
    config.write(offset, width, now | off)?;
    Ok(config.read(offset, width)? & off != 0)
}
