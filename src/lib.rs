//! pcibackd as a library: the daemon, and what the command line shares with it.
//!
//! | module | holds |
//! |---|---|
//! | [`daemon`] | start-up, and the loop that starts a session for each guest |
//! | [`session`] | one guest: states, exported devices, operations |
//! | [`virtual_devices`] | virtio devices of HVM guests |
//! | [`host`] | the host's devices and how they change hands |
//! | [`facade`] | `/sys/bus/pci/drivers/pciback` for unmodified toolstacks |
//! | [`fdstore`] | descriptors that outlive the daemon |
//! | [`control`] | the control socket |
//! | [`metrics`] | metrics for Prometheus |
//! | [`trace`] | guests' operations as they happen |
//! | [`config`] | the configuration file |
//! | [`doctor`] | what is wrong with this host, or a device, and what to do |
//! | `command` | running the toolstack's programs |
//! | `outlive` | being a process that outlives the daemon |
//! | `rights` | descriptors that come with messages |
//! | [`memory`] | keeping the daemon small |
//! | [`arguments`] | the command line |
//! | [`logging`], [`text`], [`rate_limit`] | messages |
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

pub mod arguments;
mod command;
pub mod config;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod facade;
pub mod fdstore;
pub mod host;
pub mod logging;
pub mod memory;
pub mod metrics;
mod outlive;
pub mod rate_limit;
mod rights;
pub mod session;
pub mod text;
pub mod trace;
pub mod virtual_devices;
