//! A guest's CPU, as far as it accesses devices: it stops with each access until that is answered.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::servers::Slot;
use crate::ioreq::{Flags, Ioreq, Kind, State};
use crate::sim::evtchn::take;
use crate::sim::guest::wait_readable;
use crate::sim::{Machine, lock};
use crate::types::DomId;

/// Ports of the mechanism for configuration accesses (PCI 3.0, 3.2.2.3.2).
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;

/// A CPU does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VcpuError {
    /// It still waits.
    #[error("an access was not answered: the CPU would hang for ever")]
    Hangs,
    /// The answer was not one that Xen takes: it has crashed the guest.
    #[error("an IOREQ server has set a state that it must not: the guest has crashed")]
    Crashed,
    /// The domain was destroyed, or there is no such CPU.
    #[error("there is no such CPU")]
    Gone,
}

/// Which way data go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the device to the guest.
    Read,
    /// From the guest to the device.
    Write,
}

/// One CPU. It can do one thing at a time.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) machine: Machine,
    pub(super) domain: DomId,
    pub(super) index: u32,
    /// After this long a CPU that waits is taken to hang.
    pub(super) patience: Duration,
}

/// All ones, as many as there are in `size` bytes.
fn ones(size: u32) -> u64 {
    let unused = 64u32.saturating_sub(size.saturating_mul(8));
    u64::MAX.checked_shr(unused).unwrap_or(0)
}

impl Vcpu {
    /// Has a CPU that is not answered for so long report that it hangs. To begin with: 10 s.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// `in`. What nobody answers reads as all ones.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn port_read(&self, port: u16, size: u32) -> Result<u32, VcpuError> {
        let value = self.issue(Ioreq {
            addr: port.into(),
            count: 1,
            size,
            flags: Flags::READ.bits(),
            kind: Kind::Port as u8,
            ..Ioreq::default()
        })?;
        Ok((value & ones(size.min(4))) as u32)
    }

    /// `out`.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn port_write(&self, port: u16, size: u32, value: u32) -> Result<(), VcpuError> {
        let request = Ioreq {
            addr: port.into(),
            data: value.into(),
            count: 1,
            size,
            kind: Kind::Port as u8,
            ..Ioreq::default()
        };
        self.issue(request).map(drop)
    }

    /// Reads memory that is a device's.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn memory_read(&self, address: u64, size: u32) -> Result<u64, VcpuError> {
        let value = self.issue(Ioreq {
            addr: address,
            count: 1,
            size,
            flags: Flags::READ.bits(),
            kind: Kind::Memory as u8,
            ..Ioreq::default()
        })?;
        Ok(value & ones(size))
    }

    /// Writes memory that is a device's.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn memory_write(&self, address: u64, size: u32, value: u64) -> Result<(), VcpuError> {
        self.memory_fill(address, size, value, 1)
    }

    /// `rep stos`: writes one value to `count` places.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn memory_fill(
        &self,
        address: u64,
        size: u32,
        value: u64,
        count: u32,
    ) -> Result<(), VcpuError> {
        let request = Ioreq {
            addr: address,
            data: value,
            count,
            size,
            kind: Kind::Memory as u8,
            ..Ioreq::default()
        };
        self.issue(request).map(drop)
    }

    /// `rep movs` between a device's memory and the guest's own, `rep ins` and `rep outs`: `count` elements of `size` bytes.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn string(
        &self,
        kind: Kind,
        direction: Direction,
        device: u64,
        memory: u64,
        (count, size): (u32, u32),
        descending: bool,
    ) -> Result<(), VcpuError> {
        let mut flags = Flags::DATA_IS_PTR;
        flags.set(Flags::READ, direction == Direction::Read);
        flags.set(Flags::DESCENDING, descending);
        let request = Ioreq {
            addr: device,
            data: memory,
            count,
            size,
            flags: flags.bits(),
            kind: kind as u8,
            ..Ioreq::default()
        };
        self.issue(request).map(drop)
    }

    /// Reads configuration space the way PCs do. `function` is bus, device and function in 16 bits.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn config_read(&self, function: u16, register: u8, size: u32) -> Result<u32, VcpuError> {
        self.port_read(self.select_register(function, register)?, size)
    }

    /// Writes configuration space.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn config_write(
        &self,
        function: u16,
        register: u8,
        size: u32,
        value: u32,
    ) -> Result<(), VcpuError> {
        self.port_write(self.select_register(function, register)?, size, value)
    }

    /// Gives the port at which the register is.
    fn select_register(&self, function: u16, register: u8) -> Result<u16, VcpuError> {
        let address = 1 << 31 | u32::from(function) << 8 | u32::from(register & 0xfc);
        self.port_write(CONFIG_ADDRESS, 4, address)?;
        Ok(CONFIG_DATA | u16::from(register & 3))
    }

    /// Tells all servers something.
    pub(super) fn broadcast(&self, kind: Kind, data: u64) -> Result<(), VcpuError> {
        let request = Ioreq {
            data,
            size: 8,
            kind: kind as u8,
            ..Ioreq::default()
        };
        let slots: Vec<_> = {
            let mut hypervisor = lock(&self.machine.inner.hypervisor);
            let domain = hypervisor.alive(self.domain).map_err(|_| VcpuError::Gone)?;
            let hvm = domain.hvm.as_ref().ok_or(VcpuError::Gone)?;
            let servers = hvm.servers.enabled();
            let slots: Vec<_> = servers
                .filter_map(|server| server.slot(self.index))
                .collect();
            slots
                .into_iter()
                .filter(|slot| slot.send(&request))
                .collect()
        };
        slots.iter().try_for_each(|slot| self.wait(slot).map(drop))
    }

    /// Makes any request, and waits for the answer: the value that the CPU reads.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn issue(&self, mut request: Ioreq) -> Result<u64, VcpuError> {
        let slot = {
            let mut hypervisor = lock(&self.machine.inner.hypervisor);
            let domain = hypervisor.alive(self.domain).map_err(|_| VcpuError::Gone)?;
            let hvm = domain.hvm.as_mut().ok_or(VcpuError::Gone)?;
            if self.index >= hvm.vcpus {
                return Err(VcpuError::Gone);
            }
            let writes = !request.flags().contains(Flags::READ);
            let is_config_address =
                request.kind == Kind::Port as u8 && request.addr == CONFIG_ADDRESS.into();
            if is_config_address && writes && request.size == 4 {
                hvm.config_address = request.data as u32;
            }
            let selected = hvm.servers.select(&mut request, hvm.config_address);
            selected
                .and_then(|server| server.slot(self.index))
                .filter(|slot| slot.send(&request))
        };
        match slot {
            Some(slot) => self.wait(&slot),
            None => Ok(u64::MAX),
        }
    }

    /// Waits for the answer, as Xen does: woken by the event channel and by nothing else.
    fn wait(&self, slot: &Slot) -> Result<u64, VcpuError> {
        let start = Instant::now();
        let mut last = State::Ready;
        loop {
            match slot.page.state(slot.index) {
                Some(State::Answered) => {
                    let data = slot.page.fetch(slot.index).data;
                    slot.page.set_state(slot.index, State::None);
                    return Ok(data);
                }
                // The server was destroyed.
                Some(State::None) => {
                    let gone = lock(&self.machine.inner.hypervisor)
                        .alive(self.domain)
                        .is_err();
                    return if gone {
                        Err(VcpuError::Gone)
                    } else {
                        Ok(u64::MAX)
                    };
                }
                Some(state) if state >= last => last = state,
                _ => {
                    // Was it destroyed meanwhile, it does not matter.
                    let _ = self.machine.domain_shut_down(self.domain);
                    return Err(VcpuError::Crashed);
                }
            }
            let event = slot.port.event.as_fd();
            while !take(event).map_err(|_| VcpuError::Gone)? {
                let left = self.patience.saturating_sub(start.elapsed());
                if left.is_zero() {
                    return Err(VcpuError::Hangs);
                }
                wait_readable(event, left).map_err(|_| VcpuError::Gone)?;
            }
        }
    }
}
