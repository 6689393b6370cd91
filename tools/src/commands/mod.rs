//! The commands.

pub mod acpi;
pub mod create;
pub mod doctor;
mod dropped;
pub mod exec;
pub mod facade;
pub mod hide;
pub mod list;
pub mod metrics;
pub mod persist;
pub mod reset;
pub mod set;
pub mod shell;
pub mod show;
pub mod status;
pub mod trace;
pub mod vf;
pub mod virtio;
