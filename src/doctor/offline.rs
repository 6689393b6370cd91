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
/// When there is no such device, or the bus cannot be listed.
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
    let mut findings = Vec::new();
    for bdf in device.map_or_else(|| known.clone(), |device| vec![device]) {
        findings.extend(device::judge(&DeviceFacts::gather(bus, bdf, standing)?));
    }
    Ok(findings)
}
