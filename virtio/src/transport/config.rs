//! The device configuration (virtio 1.3, section 2.5). Faces have it at different places, some
//! behind other registers, so an access may lie in it in part.

use conf_space::Width;

use super::core::Core;
use crate::register::bytes_to_value;

/// What the driver reads of a configuration that starts at `start`; zero for bytes in front of it.
pub(crate) fn read(core: &Core, start: u64, offset: u64, width: Width) -> u32 {
    let Some((at, skip)) = place(start, offset, width) else {
        return 0;
    };
    let mut data = [0; 4];
    if let Some(part) = data.get_mut(skip..usize::from(width.bytes())) {
        core.read_config(at, part);
    }
    bytes_to_value(&data)
}

/// The driver writes; bytes in front of `start` are left out.
pub(crate) fn write(core: &mut Core, start: u64, offset: u64, width: Width, value: u32) {
    let Some((at, skip)) = place(start, offset, width) else {
        return;
    };
    let data = value.to_le_bytes();
    if let Some(part) = data.get(skip..usize::from(width.bytes())) {
        core.write_config(at, part);
    }
}

/// Offset in the configuration, and how many bytes of the access lie in front of it.
fn place(start: u64, offset: u64, width: Width) -> Option<(usize, usize)> {
    let skip = usize::try_from(start.saturating_sub(offset)).ok()?;
    let at = usize::try_from(offset.saturating_sub(start)).ok()?;
    (skip < usize::from(width.bytes())).then_some((at, skip))
}
