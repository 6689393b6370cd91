//! What a BAR decodes, as the embedded Xen has it.

use conf_space::Resource;
use xenbus::sim::{BarSpace, Window};

/// The window of a BAR, or of the expansion ROM (6), that has an address.
pub(super) fn window(bar: u8, resource: &Resource) -> Option<Window> {
    let space = if resource.is_io() {
        BarSpace::Io
    } else {
        BarSpace::Memory
    };
    (resource.is_present() && resource.start != 0).then_some(Window {
        bar,
        space,
        address: resource.start,
        size: resource.size,
    })
}
