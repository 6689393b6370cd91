//! pcibackd: the Xen PCI backend daemon.
fn main() {}
