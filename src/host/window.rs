//! What a BAR decodes, as the embedded Xen has it.

use conf_space::Resource;
use xenbus::sim::{BarSpace, Window};

/// What its addresses are of.
pub(super) fn space(resource: &Resource) -> BarSpace {
    if resource.is_io() {
        BarSpace::Io
    } else {
        BarSpace::Memory
    }
}

/// The window of a BAR, or of the expansion ROM (6), that has an address.
pub(super) fn window(bar: u8, resource: &Resource) -> Option<Window> {
    (resource.is_present() && resource.start != 0).then_some(Window {
        bar,
        space: space(resource),
        address: resource.start,
        size: resource.size,
    })
}
