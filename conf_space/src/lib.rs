//! The PCI model: addresses, registers, capabilities and what of them a guest sees.
//!
//! Pure: no file, no file descriptor, no Xen. Whoever owns a device lends it as a [`ConfigSpace`];
//! everything here takes values and returns values.
//!
//! | module | holds |
//! |---|---|
//! | [`address`] | checked device addresses ([`Bdf`]) |
//! | [`bdf_list`] | lists of devices as operators write them |
//! | [`selector`] | other ways to say which device is meant: by its place, by its kind |
//! | [`access`] | reading and writing a configuration space ([`ConfigSpace`]) |
//! | [`memory`] | a configuration space in memory, for simulated devices and tests |
//! | [`registers`] | register blocks as tables of named registers |
//! | [`capabilities`] | the walk of both capability lists |
//! | [`resource`] | what a BAR decodes |
//! | [`overlay`] | what a guest sees and may change of one function |
//! | [`emulated`] | functions that do not exist: all of their space is ours |
//! | [`fuzz`] | an entry point for fuzzing |
//! | [`topology`] | where a guest sees its devices |
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

pub mod access;
pub mod address;
pub mod bdf_list;
pub mod capabilities;
pub mod emulated;
pub mod fuzz;
pub mod memory;
pub mod overlay;
pub mod registers;
pub mod resource;
pub mod selector;
pub mod topology;

pub use access::{AccessError, ConfigSize, ConfigSpace, Width};
pub use address::Bdf;
pub use resource::{Resource, ResourceFlags};
