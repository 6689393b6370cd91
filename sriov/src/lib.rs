//! Physical and virtual functions of SR-IOV devices, as Linux shows them in a device's directory in
//! sysfs (Linux `Documentation/ABI/testing/sysfs-bus-pci`; PCI Express Base Specification 6.0,
//! section 9.2).
//!
//! A virtual function's registers tell less than they do elsewhere: vendor and device id read
//! 0xffff, its BARs and its memory enable bit read zero. What is true of it is known from its
//! physical function, which is how the kernel knows: sysfs's `vendor`, `device` and `resource`.
//!
//! Virtual functions are made and taken away by their physical function's driver. [`must_change`]
//! says whether it can be told to.

mod directory;
mod provisioning;

use std::io;
use std::path::PathBuf;

use conf_space::Bdf;

pub use provisioning::{Refusal, must_change};

/// What sysfs says of a device that cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or link cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file or link.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file or link does not hold what the kernel puts there.
    #[error("{path} holds '{found}', which is not {expected}")]
    Malformed {
        /// The file or link.
        path: PathBuf,
        /// Its content.
        found: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// The physical function does not count the virtual function among its own: it is just being
    /// removed.
    #[error(
        "{physical} does not list {directory} among its virtual functions; they are being changed: try again"
    )]
    Unlisted {
        /// The physical function.
        physical: Bdf,
        /// The virtual function's directory.
        directory: PathBuf,
    },
}

/// What a device is to SR-IOV.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Function {
    /// Nothing: an ordinary device.
    Plain,
    /// A physical function.
    Physical {
        /// How many virtual functions are enabled.
        enabled: u16,
        /// How many it can have.
        total: u16,
        /// Those that exist, by index. Fewer than `enabled` while they are being made.
        virtual_functions: Vec<(u16, Bdf)>,
    },
    /// A virtual function.
    Virtual {
        /// The physical function it belongs to.
        physical: Bdf,
        /// Its number there, from 0.
        index: u16,
    },
}
