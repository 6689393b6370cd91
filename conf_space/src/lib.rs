//! The PCI model: addresses, registers, capabilities and what of them a guest sees.
