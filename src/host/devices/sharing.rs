//! Who has what a device shares its INTx line or a memory page with.

use conf_space::address::Bdf;
use conf_space::registers::header::{self, command};
use conf_space::{AccessError, ConfigSpace};
use xenbus::DomId;

use super::{Device, Devices, Line};
use crate::host::HostError;
use crate::host::record::Phase;
use crate::host::sharing::{Holder, Neighbour, Shared, in_pages, on_line};

/// What a device shares with devices of others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sharing {
    /// Its INTx line, with whom. `what` is the GSI.
    pub line: Vec<Shared<u32>>,
    /// Memory pages, with whom. `what` is the first such page's address.
    pub pages: Vec<Shared<u64>>,
}

impl Devices {
    /// All devices but one, and who has them.
    ///
    /// # Errors
    /// When the bus cannot be listed.
    pub fn neighbours(&self, of: Bdf) -> Result<Vec<Neighbour>, HostError> {
        let found = self.bus.survey()?.into_iter();
        Ok(found
            .filter(|occupies| occupies.bdf != of)
            .map(|mut occupies| {
                let Some(hidden) = self.get(occupies.bdf) else {
                    let holder = Holder::Dom0(occupies.driver.clone());
                    return Neighbour { occupies, holder };
                };
                let owner = hidden
                    .record
                    .owner()
                    .filter(|_| hidden.record.phase() == Some(Phase::Assigned));
                let irq = hidden.description.irq;
                occupies.line = (irq != 0 && hidden.line() == Line::Usable).then_some(irq);
                Neighbour {
                    occupies,
                    holder: owner.map_or(Holder::Nobody, |owner| Holder::Guest(owner.domain)),
                }
            })
            .collect())
    }

    /// What a device that `domain` is to have shares with devices of others.
    ///
    /// # Errors
    /// When the bus cannot be listed.
    pub fn sharing(&self, device: &Device, domain: DomId) -> Result<Sharing, HostError> {
        let neighbours = self.neighbours(device.bdf)?;
        let description = &device.description;
        Ok(Sharing {
            line: on_line(description.irq, Some(domain), &neighbours),
            pages: in_pages(&description.identity.resources, Some(domain), &neighbours),
        })
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
