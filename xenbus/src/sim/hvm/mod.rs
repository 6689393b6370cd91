//! HVM guests: their memory, their CPUs and interrupts, and the IOREQ servers that answer what the CPUs access.

mod device_model;
mod guest;
mod interrupts;
mod memory;
mod ranges;
mod servers;
mod vcpu;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

pub use guest::HvmGuest;
pub use interrupts::Message;
pub use vcpu::{Direction, Vcpu, VcpuError};

use interrupts::Interrupts;
use memory::Memory;
use servers::Servers;

/// What is special about an HVM domain.
#[derive(Debug)]
pub(super) struct Hvm {
    pub vcpus: u32,
    memory: Memory,
    servers: Servers,
    interrupts: Arc<Interrupts>,
    /// What was last written to port 0xcf8.
    config_address: u32,
    /// Mappings that dom0 has of the guest's memory and of its servers' pages.
    held: usize,
}

impl Hvm {
    /// A guest with `bytes` of memory from address 0 on.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(vcpus: u32, bytes: u64) -> io::Result<Self> {
        Ok(Self {
            vcpus,
            memory: Memory::new(bytes)?,
            servers: Servers::default(),
            interrupts: Arc::default(),
            config_address: 0,
            held: 0,
        })
    }

    /// The guest has been destroyed.
    pub fn end(&mut self) {
        self.servers.clear();
    }

    /// Whether dom0 still maps something of it.
    pub fn is_held(&self) -> bool {
        self.held > 0
    }
}
