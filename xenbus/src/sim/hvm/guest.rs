//! An HVM guest, as the software that runs in it sees its machine.

use std::io;
use std::time::Duration;

use nix::errno::Errno;

use super::interrupts::Message;
use super::vcpu::{Vcpu, VcpuError};
use crate::device_model::{DeviceModel, ForeignMapping, IntxPin};
use crate::ioreq::Kind;
use crate::sim::Machine;
use crate::types::DomId;

/// A guest. It lives in this process: its driver is a test's, its CPUs are threads of whoever uses them.
#[derive(Debug, Clone)]
pub struct HvmGuest {
    machine: Machine,
    domain: DomId,
}

impl Machine {
    /// An HVM guest that was made with [`Machine::create_domain`].
    pub fn hvm_guest(&self, domain: DomId) -> HvmGuest {
        HvmGuest {
            machine: self.clone(),
            domain,
        }
    }
}

impl HvmGuest {
    /// Which domain it is.
    pub fn domain(&self) -> DomId {
        self.domain
    }

    /// One of its CPUs. Each can be used by one thread at a time.
    pub fn vcpu(&self, index: u32) -> Vcpu {
        Vcpu {
            machine: self.machine.clone(),
            domain: self.domain,
            index,
            patience: Duration::from_secs(10),
        }
    }

    /// Reads the guest's memory.
    ///
    /// # Errors
    /// EFAULT where there is none, ESRCH when the guest is gone.
    pub fn read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        let read = self
            .machine
            .with_hvm(self.domain, |hvm, _| hvm.memory.read(address, into));
        Ok(read?)
    }

    /// Writes the guest's memory.
    ///
    /// # Errors
    /// EFAULT where there is none, ESRCH when the guest is gone.
    pub fn write(&self, address: u64, from: &[u8]) -> io::Result<()> {
        let written = self
            .machine
            .with_hvm(self.domain, |hvm, _| hvm.memory.write(address, from));
        Ok(written?)
    }

    /// Maps memory for the guest's own driver, which is to mind that what it balloons out is not the guest's any more.
    ///
    /// # Errors
    /// When the system has no memory left, or the guest is gone.
    pub fn map(&self, first_frame: u64, count: usize) -> io::Result<Box<dyn ForeignMapping>> {
        self.machine.map_foreign(self.domain, first_frame, count)
    }

    /// Gives a frame back to Xen, as a balloon driver does. The servers are told.
    ///
    /// # Errors
    /// EINVAL when the guest has no such frame; [`VcpuError`], for `vcpu` is the one that waits for them.
    pub fn balloon_out(&self, vcpu: &Vcpu, frame: u64) -> io::Result<()> {
        self.machine
            .with_hvm(self.domain, |hvm, _| hvm.memory.take_out(frame))?;
        vcpu.broadcast(Kind::Invalidate, u64::MAX)
            .map_err(io::Error::other)
    }

    /// Gets a frame from Xen.
    ///
    /// # Errors
    /// EINVAL when the guest has one there, or may have none.
    pub fn balloon_in(&self, frame: u64) -> io::Result<()> {
        let result = self.machine.with_hvm(self.domain, |hvm, _| {
            hvm.memory.put_in(frame).map_err(|_| Errno::EINVAL)
        });
        Ok(result?)
    }

    /// Sets the clock. The servers are told, by how much it differs from the host's.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn set_clock(&self, vcpu: &Vcpu, seconds: i64) -> Result<(), VcpuError> {
        vcpu.broadcast(Kind::TimeOffset, seconds.cast_unsigned())
    }

    /// Waits for a message that is one of the wanted, and takes it. Others stay.
    pub fn take_message(
        &self,
        timeout: Duration,
        wanted: impl Fn(&Message) -> bool,
    ) -> Option<Message> {
        let interrupts = self.machine.interrupts_of(self.domain).ok()?;
        interrupts.take(timeout, wanted)
    }

    /// Waits until an interrupt pin has a level. False: it did not.
    pub fn wait_intx(&self, pin: IntxPin, level: bool, timeout: Duration) -> bool {
        let interrupts = self.machine.interrupts_of(self.domain);
        interrupts.is_ok_and(|interrupts| interrupts.wait_pin(pin, level, timeout))
    }

    /// Waits until an ISA interrupt has a level. False: it did not.
    pub fn wait_isa(&self, irq: u8, level: bool, timeout: Duration) -> bool {
        let interrupts = self.machine.interrupts_of(self.domain);
        interrupts.is_ok_and(|interrupts| interrupts.wait_isa(irq, level, timeout))
    }
}
