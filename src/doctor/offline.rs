//! Looking at devices when no daemon answers: from its records, and from sysfs.

use std::io;
use std::path::Path;

use conf_space::address::Bdf;

use super::Finding;
use super::device;
use super::device_facts::{DeviceFacts, Standing};
use crate::host::record::Record;
use crate::host::{Bus, HostError};

/// Looks at one device, or at all that have a record in `records`.
///
/// # Errors
/// When the one that is named cannot be looked at.
pub fn examine(
    bus: &dyn Bus,
    records: &Path,
    device: Option<Bdf>,
) -> Result<Vec<Finding>, HostError> {
    let known = match Record::list(records) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("{}: {error}", records.display());
            Vec::new()
        }
        other => other.unwrap_or_default(),
    };
    let standing = |bdf: Bdf| {
        // Opening one that is not there would make it.
        let record = known
            .contains(&bdf)
            .then(|| Record::open(records, bdf).ok())?;
        Standing::of(&record?)
    };
    let look = |bdf| Ok(device::judge(&DeviceFacts::gather(bus, bdf, standing)?));
    match device {
        Some(bdf) => look(bdf),
        None => Ok(known
            .iter()
            .flat_map(|&bdf| look(bdf).unwrap_or_else(|error| device::unknown(bdf, &error)))
            .collect()),
    }
}
