//! Making virtual functions that no driver of dom0's takes: for that moment the kernel is told to leave those of their physical function alone.
//! A note is made of it first, for the daemon that is started after one that was killed meanwhile.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

use conf_space::address::Bdf;

use super::{DeviceError, Devices};
use crate::host::HostError;
use crate::host::record::RecordError;
use crate::text::chain;

/// Ending of a note's name, whose beginning is the physical function's address.
const NOTE: &str = ".unprobed";

impl Devices {
    fn note(&self, physical: Bdf) -> PathBuf {
        self.directory.join(format!("{physical}{NOTE}"))
    }

    /// Does something while dom0's drivers leave new virtual functions alone.
    pub(super) fn unprobed(
        &self,
        physical: Bdf,
        make: impl FnOnce() -> Result<(), HostError>,
    ) -> Result<(), DeviceError> {
        if !self.bus.are_functions_probed(physical)? {
            return Ok(make()?);
        }
        let path = self.note(physical);
        File::create(&path).map_err(|source| RecordError::Io { path, source })?;
        let made = self
            .bus
            .set_functions_probed(physical, false)
            .and_then(|()| make());
        // Also after a failure.
        self.have_probed(physical);
        Ok(made?)
    }

    /// After a start: what a daemon that was killed did not come to.
    pub(super) fn have_functions_probed_again(&self) {
        let entries = fs::read_dir(&self.directory).into_iter().flatten();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let physical = name.to_str().and_then(|name| name.strip_suffix(NOTE));
            if let Some(Ok(physical)) = physical.map(str::parse) {
                self.have_probed(physical);
            }
        }
    }

    fn have_probed(&self, physical: Bdf) {
        match self.bus.set_functions_probed(physical, true) {
            Ok(()) | Err(HostError::NoDevice { .. }) => {}
            // The next start tries again.
            Err(error) => return log::warn!("{}", chain(&error)),
        }
        let path = self.note(physical);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("{}: {error}", path.display());
        }
    }
}
