//! A configuration space that is looked at and not touched.

use conf_space::{AccessError, ConfigSpace, Width};

/// Reads reach the device, writes do not.
pub struct ReadOnly<'a>(pub &'a dyn ConfigSpace);

impl ConfigSpace for ReadOnly<'_> {
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        self.0.read(offset, width)
    }

    fn write(&self, _offset: u16, _width: Width, _value: u32) -> Result<(), AccessError> {
        Ok(())
    }
}
