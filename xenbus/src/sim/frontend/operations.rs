//! Operations: one at a time, through the page.

use std::time::{Duration, Instant};

use super::variant::Scan;
use super::{Frontend, FrontendError, Step, Variant};
use crate::pciif::{Command, Flags, PciError, PciOp};
use crate::types::PciDevice;
use crate::xenstore::Store;

/// A frontend that never gives up would let a test hang. This is when we give up in its stead, leaving the operation where it is.
const PATIENCE: Duration = Duration::from_secs(30);

/// So often a frontend that polls looks into the page before it lets other threads run.
const LOOKS: u32 = 256;

/// What came of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// Its number, a [`Command`]'s as a rule.
    pub command: u32,
    /// The function's virtual address.
    pub function: PciDevice,
    /// Offset of a configuration access.
    pub offset: i32,
    /// Its width in bytes.
    pub size: i32,
    /// The value written, or read.
    pub value: u32,
    /// The answer; `None` when none came in time.
    pub result: Option<PciError>,
    /// From the notification to the answer.
    pub took: Duration,
}

/// An operation on a function.
pub(super) fn operation(command: Command, function: PciDevice) -> PciOp {
    PciOp {
        cmd: command as u32,
        domain: function.segment.into(),
        bus: function.bus.into(),
        devfn: function.devfn.into(),
        ..PciOp::default()
    }
}

/// The function that an operation is about, as far as its address is one.
fn function_of(op: &PciOp) -> PciDevice {
    let low = |word: u32| u8::try_from(word & 0xff).unwrap_or_default();
    let segment = u16::try_from(op.domain & 0xffff).unwrap_or_default();
    PciDevice {
        segment,
        bus: low(op.bus),
        devfn: low(op.devfn),
    }
}

impl Frontend {
    /// Sets how long an operation is waited for until it is given up; `None` for ever.
    pub fn set_op_timeout(&mut self, timeout: Option<Duration>) {
        self.op_timeout = timeout;
    }

    /// Hands any operation to the backend and waits for the answer, whatever it is.
    ///
    /// # Errors
    /// [`FrontendError::NoAnswer`]; the page is then as the frontend leaves it: given up, or still waiting.
    pub fn operate(&mut self, op: &PciOp) -> Result<PciOp, FrontendError> {
        let link = self.link()?;
        link.page.submit(op);
        link.port.notify()?;
        self.finish(op)
    }

    /// Waits for the answer to what was submitted.
    pub(super) fn finish(&mut self, op: &PciOp) -> Result<PciOp, FrontendError> {
        let start = Instant::now();
        let limit = self.op_timeout.unwrap_or(PATIENCE);
        let waits_for_event = self.variant.traits().waits_for_event;
        let link = self.link()?;
        while link.page.pending() {
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                break;
            }
            if waits_for_event {
                link.port.wait(left)?;
            } else if (0..LOOKS).all(|_| link.page.pending()) {
                link.port.take()?;
                std::thread::yield_now();
            }
        }
        let answered = !link.page.pending();
        let answer = link.page.answer();
        if !answered && self.op_timeout.is_some() {
            link.page.clear_flags(Flags::OP_ACTIVE);
        }
        let took = start.elapsed();
        let function = function_of(op);
        let (command, offset, size) = (op.cmd, op.offset, op.size);
        let result = answered.then_some(PciError(answer.err));
        let value = if command == Command::ConfWrite as u32 {
            op.value
        } else {
            answer.value
        };
        self.report(Step::Operation(Operation {
            command,
            function,
            offset,
            size,
            value,
            result,
            took,
        }));
        if answered {
            Ok(answer)
        } else {
            Err(FrontendError::NoAnswer {
                command,
                function,
                waited: took,
            })
        }
    }

    /// Carries an operation out that is to succeed.
    pub(super) fn perform(&mut self, command: Command, op: &PciOp) -> Result<PciOp, FrontendError> {
        let answer = self.operate(op)?;
        match PciError(answer.err) {
            PciError::SUCCESS => Ok(answer),
            error => Err(FrontendError::Refused {
                command,
                function: function_of(op),
                error,
            }),
        }
    }

    /// The address that an operation on a function carries: the function's, but Mini-OS looks it up each time.
    pub(super) fn address(&mut self, function: PciDevice) -> Result<PciDevice, FrontendError> {
        if self.variant.traits().scan != Scan::List {
            return Ok(function);
        }
        for index in 0..self.device_count()? {
            if self.read_device("dev", index)? == Some(function)
                && let Some(address) = self.read_device("vdev", index)?
            {
                return Ok(address);
            }
        }
        Err(FrontendError::Missing {
            function,
            what: "virtual address",
        })
    }

    /// Reads `size` bytes of configuration space at `offset`. [`Variant::NetBsd`] reads 4, and takes its part.
    ///
    /// # Errors
    /// [`FrontendError::Refused`], [`FrontendError::NoAnswer`].
    pub fn conf_read(
        &mut self,
        function: PciDevice,
        offset: u16,
        size: u8,
    ) -> Result<u32, FrontendError> {
        if self.variant == Variant::NetBsd && size < 4 {
            let word = self.read_as_is(function, offset & !3, 4)?;
            return Ok(word >> shift(offset) & mask(size));
        }
        self.read_as_is(function, offset, size)
    }

    fn read_as_is(
        &mut self,
        function: PciDevice,
        offset: u16,
        size: u8,
    ) -> Result<u32, FrontendError> {
        let address = self.address(function)?;
        let op = PciOp {
            offset: offset.into(),
            size: size.into(),
            ..operation(Command::ConfRead, address)
        };
        self.perform(Command::ConfRead, &op)
            .map(|answer| answer.value)
    }

    /// Writes `size` bytes of configuration space at `offset`. [`Variant::NetBsd`] reads 4 bytes, changes its part, and writes 4.
    ///
    /// # Errors
    /// As [`Frontend::conf_read`].
    pub fn conf_write(
        &mut self,
        function: PciDevice,
        offset: u16,
        size: u8,
        value: u32,
    ) -> Result<(), FrontendError> {
        if self.variant == Variant::NetBsd && size < 4 {
            let word = self.read_as_is(function, offset & !3, 4)?;
            let (shift, mask) = (shift(offset), mask(size));
            return self.write_as_is(
                function,
                offset & !3,
                4,
                word & !(mask << shift) | (value & mask) << shift,
            );
        }
        self.write_as_is(function, offset, size, value)
    }

    fn write_as_is(
        &mut self,
        function: PciDevice,
        offset: u16,
        size: u8,
        value: u32,
    ) -> Result<(), FrontendError> {
        let address = self.address(function)?;
        let op = PciOp {
            offset: offset.into(),
            size: size.into(),
            value,
            ..operation(Command::ConfWrite, address)
        };
        self.perform(Command::ConfWrite, &op).map(drop)
    }

    /// A write whose refusal its original does not look at: a backend may well refuse it.
    pub(super) fn conf_try_write(
        &mut self,
        function: PciDevice,
        offset: u16,
        size: u8,
        value: u32,
    ) -> Result<(), FrontendError> {
        match self.conf_write(function, offset, size, value) {
            Err(FrontendError::Refused { .. }) => Ok(()),
            other => other,
        }
    }

    /// `num_devs` of the backend.
    pub(super) fn device_count(&mut self) -> Result<u32, FrontendError> {
        Ok(self.store.read_u32(&format!("{}/num_devs", self.backend))?)
    }

    /// A device's address in one of the backend's nodes; `None` when there is no such node.
    pub(super) fn read_device(
        &mut self,
        node: &str,
        index: u32,
    ) -> Result<Option<PciDevice>, FrontendError> {
        let path = format!("{}/{node}-{index}", self.backend);
        let value = match self.store.read_string(&path) {
            Ok(value) => value,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match parse_address(&value) {
            Some(device) => Ok(Some(device)),
            None => Err(FrontendError::Node { path, value }),
        }
    }
}

/// Where a register's lowest bit is in the 4 bytes that hold it.
fn shift(offset: u16) -> u32 {
    u32::from(offset & 3) << 3
}

/// As many ones as `size` bytes have bits.
pub(super) fn mask(size: u8) -> u32 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        _ => u32::MAX,
    }
}

/// Reads `%x:%x:%x.%x`.
pub(super) fn parse_address(text: &str) -> Option<PciDevice> {
    let mut fields = text.split([':', '.']);
    let mut next = |limit: u16| {
        u16::from_str_radix(fields.next()?, 16)
            .ok()
            .filter(|number| *number <= limit)
    };
    let (segment, bus, slot, function) = (next(u16::MAX)?, next(0xff)?, next(0x1f)?, next(7)?);
    let devfn = u8::try_from(slot << 3 | function).ok()?;
    if fields.next().is_some() {
        return None;
    }
    Some(PciDevice {
        segment,
        bus: u8::try_from(bus).ok()?,
        devfn,
    })
}
