//! What [`Request::Trace`](super::protocol::Request::Trace) asks for and gets. `pciback trace --json` prints these as they are.

use conf_space::address::Bdf;
use serde::{Deserialize, Serialize};

/// Which operations are wanted. What is not said does not matter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Filter {
    /// Those of this guest: its number or its name. It need not be there yet.
    pub guest: Option<String>,
    /// Those on this device of the host.
    pub device: Option<Bdf>,
    /// Those that change something: all but reads.
    pub writes: bool,
    /// Those that were dropped, refused, or failed.
    pub errors: bool,
    /// Those of these commands, by their names; empty: all.
    pub commands: Vec<String>,
}

/// One operation of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traced {
    /// When it was answered: microseconds since 1970.
    pub time_us: u64,
    /// The guest's number.
    pub domain: u16,
    /// The guest's name.
    pub guest: String,
    /// The host's device; none if the guest has none where it asked.
    pub device: Option<Bdf>,
    /// Where the guest asked.
    pub seen_as: String,
    /// The command's name, or `unknown`.
    pub command: String,
    /// The command's number.
    pub number: u32,
    /// Of a read or write: the offset in configuration space, as the guest wrote it.
    pub offset: Option<i32>,
    /// Of a read or write: its width in bytes, as the guest wrote it.
    pub size: Option<i32>,
    /// What was written, or read with success; of an enabled MSI, its PIRQ.
    pub value: Option<u32>,
    /// Of MSI and MSI-X that are to be enabled: the number of vectors.
    pub vectors: Option<u32>,
    /// The registers that were read or written.
    pub registers: Vec<TracedRegister>,
    /// `done`, `dropped`, `absent`, `refused`, `failed`.
    pub outcome: String,
    /// What the guest was told: 0, or an error's number (Xen `io/pciif.h`, `XEN_PCI_ERR_*`, or a negative errno).
    pub error: i32,
    /// How long it took, from being found in the guest's page to the guest's being told.
    pub took_ns: u64,
}

/// A register that an operation touched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedRegister {
    /// The header or capability that it is in.
    pub block: String,
    /// Its name, as the specification has it.
    pub name: String,
    /// Its offset in configuration space.
    pub offset: u16,
    /// Its value, as far as the operation reached it; bits beyond are 0.
    pub value: u32,
    /// The operation reached a part of it only.
    pub partial: bool,
    /// Its fields that are not 0.
    pub fields: Vec<TracedField>,
    /// What that means, where the value alone does not tell.
    pub note: Option<String>,
}

/// A field of a register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedField {
    /// Its name, as the specification has it.
    pub name: String,
    /// Its value.
    pub value: u32,
    /// It has one bit.
    pub flag: bool,
}
