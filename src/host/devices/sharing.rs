//! Who has what a device shares its INTx line or a memory page with.

use conf_space::registers::header::{self, command};
use conf_space::{AccessError, ConfigSpace};
use xenbus::DomId;

use super::{Device, Devices, Line};
use crate::host::HostError;
use crate::host::sharing::{Hidden, Shared, in_pages, neighbours, on_line};

/// What a device shares with devices of others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sharing {
    /// Its INTx line, with whom. `what` is the GSI.
    pub line: Vec<Shared<u32>>,
    /// Memory pages, with whom. `what` is the first such page's address.
    pub pages: Vec<Shared<u64>>,
}

impl Devices {
    /// What a device that `domain` is to have shares with devices of others.
    ///
    /// # Errors
    /// When the bus cannot be listed.
    pub fn sharing(&self, device: &Device, domain: DomId) -> Result<Sharing, HostError> {
        let neighbours = neighbours(self.bus.survey()?, device.bdf, |other| {
            self.get(other).map(|hidden| Hidden {
                owner: hidden.owner(),
                without_intx: hidden.line() == Line::Refused,
            })
        });
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
