//! Virtio drivers of our own, for PCI functions that the kernel's leave alone.
//!
//! | module | holds |
//! |---|---|
//! | `memory` | memory that a device can be told the address of |
//! | `function` | a PCI function's BARs |
//! | `ring` | a split ring and disk requests in that memory |
//! | `legacy` | a driver that uses the legacy registers through two BARs |
//! | `disk` | a driver of a disk's modern interface |
//! | `hostile` | one that breaks the rules: each way once (`mistakes`), and by chance (`storms`) |

mod disk;
mod function;
mod hostile;
mod legacy;
mod memory;
mod mistakes;
mod ring;
mod storms;

pub use hostile::break_rules;
pub use legacy::{compare, copy};
