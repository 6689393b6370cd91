//! What the guest's frontend does: told as it happens, with runs of operations summed up.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use conf_space::registers::header;
use xenbus::pciif::{Command, PciError};
use xenbus::sim::{Operation, Step};
use xenbus::{PciDevice, XenbusState};

use super::timeline::{Timeline, Who, duration, median};
use super::tree::bytes;

/// The operations since they were last told of, and how many there were in all.
#[derive(Debug, Clone)]
pub struct Observer {
    timeline: Timeline,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    untold: Vec<Operation>,
    total: u64,
}

/// Operations on one function.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    reads: u32,
    writes: u32,
    refused: u32,
    times: Vec<Duration>,
}

impl Observer {
    /// Has seen nothing yet.
    pub fn new(timeline: Timeline) -> Self {
        Self {
            timeline,
            seen: Arc::default(),
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a step.
    pub fn saw(&self, step: &Step) {
        match step {
            Step::Operation(operation) => {
                let mut seen = self.seen();
                seen.total = seen.total.saturating_add(1);
                seen.untold.push(*operation);
            }
            Step::State(state) => {
                self.tell_operations("");
                self.timeline
                    .tell(Who::Guest, &format!("frontend: {state}"), meaning(*state));
            }
            // Those who look on xenstore tell of it.
            Step::Backend(_) => {}
        }
    }

    /// How many operations there were in all.
    pub fn total(&self) -> u64 {
        self.seen().total
    }

    /// Tells of the operations since the last time.
    pub fn tell_operations(&self, purpose: &str) {
        let operations = std::mem::take(&mut self.seen().untold);
        let (functions, absent) = sum_up(&operations);
        if absent > 0 {
            let what = format!("asks {absent} addresses where there is no device");
            self.timeline.tell(
                Who::Guest,
                &what,
                "Linux looks at all 256 functions of a virtual bus",
            );
        }
        for (function, mut sum) in functions {
            let refused = match sum.refused {
                0 => String::new(),
                refused => format!(" ({refused} refused)"),
            };
            let what = format!(
                "{function}: {} reads, {} writes{refused}, {}",
                sum.reads,
                sum.writes,
                duration(median(&mut sum.times))
            );
            self.timeline.tell(Who::Guest, &what, purpose);
        }
        for sizing in sizings(&operations) {
            let (name, size) = sizing.result();
            let what = format!(
                "{}: {name}: writes {:08x}, reads {:08x}",
                sizing.function, sizing.written, sizing.read
            );
            self.timeline.tell(
                Who::Guest,
                &what,
                &format!("the ones that stay tell that it has {}", bytes(size)),
            );
        }
        for operation in operations.iter().filter(|operation| !is_access(operation)) {
            self.tell_one(operation);
        }
    }

    fn tell_one(&self, operation: &Operation) {
        let command = Command::from_number(operation.command).map_or_else(
            || operation.command.to_string(),
            |command| command.name().to_owned(),
        );
        let result = match operation.result {
            None => "no answer".to_owned(),
            Some(PciError::SUCCESS) => "done".to_owned(),
            Some(error) => error.to_string(),
        };
        let what = format!(
            "{}: {command}: {result} after {}",
            operation.function,
            duration(operation.took)
        );
        self.timeline.tell(Who::Guest, &what, "");
    }
}

fn is_access(operation: &Operation) -> bool {
    let access = [Command::ConfRead, Command::ConfWrite];
    access
        .iter()
        .any(|command| operation.command == *command as u32)
}

/// Configuration accesses by function, and how many went to addresses without one.
fn sum_up(operations: &[Operation]) -> (BTreeMap<PciDevice, Sum>, u32) {
    let mut functions: BTreeMap<PciDevice, Sum> = BTreeMap::new();
    let mut absent = 0u32;
    for operation in operations.iter().filter(|operation| is_access(operation)) {
        if operation.result == Some(PciError::DEV_NOT_FOUND) {
            absent = absent.saturating_add(1);
            continue;
        }
        let sum = functions.entry(operation.function).or_default();
        let count = if operation.command == Command::ConfRead as u32 {
            &mut sum.reads
        } else {
            &mut sum.writes
        };
        *count = count.saturating_add(1);
        if operation.result != Some(PciError::SUCCESS) {
            sum.refused = sum.refused.saturating_add(1);
        }
        sum.times.push(operation.took);
    }
    (functions, absent)
}

/// How a frontend found out how large a register's region is: by writing ones, and reading which of them stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizing {
    function: PciDevice,
    offset: u16,
    written: u32,
    read: u32,
}

impl Sizing {
    /// The register's name, and how large its region is.
    fn result(&self) -> (String, u64) {
        let (name, address_bits) = if self.offset == header::EXPANSION_ROM.offset {
            ("ROM".to_owned(), !0x7ff)
        } else {
            let index = self.offset.saturating_sub(header::BARS[0].offset) >> 2;
            let is_io = self.read & 1 != 0;
            (format!("BAR {index}"), if is_io { !0x3 } else { !0xf })
        };
        let stays = self.read & address_bits;
        (name, u64::from(stays & stays.wrapping_neg()))
    }

    /// Whether the next register is its upper half.
    fn is_64_bit(&self) -> bool {
        self.read & 0b111 == 0b100 && self.offset != header::EXPANSION_ROM.offset
    }
}

/// The registers that were sized and are there.
fn sizings(operations: &[Operation]) -> Vec<Sizing> {
    let mut found: Vec<Sizing> = Vec::new();
    let pairs = operations.iter().zip(operations.iter().skip(1));
    let registers = || header::BARS.iter().chain([&header::EXPANSION_ROM]);
    for (write, read) in pairs {
        let same = write.function == read.function && write.offset == read.offset;
        let register = registers().find(|register| write.offset == i32::from(register.offset));
        let ones =
            write.command == Command::ConfWrite as u32 && write.value >> 11 == u32::MAX >> 11;
        let Some(register) =
            register.filter(|_| same && ones && read.command == Command::ConfRead as u32)
        else {
            continue;
        };
        let sizing = Sizing {
            function: write.function,
            offset: register.offset,
            written: write.value,
            read: read.value,
        };
        let upper_half = found.last().is_some_and(|last| {
            last.is_64_bit()
                && last.function == sizing.function
                && last.offset.saturating_add(4) == sizing.offset
        });
        if read.value != 0 && !upper_half {
            found.push(sizing);
        }
    }
    found
}

fn meaning(state: XenbusState) -> &'static str {
    match state {
        XenbusState::Initialised => "it shares a page and an event channel with pcibackd",
        XenbusState::Connected => "it has looked, and knows its devices",
        XenbusState::Reconfiguring => "it has let go of what is to go",
        XenbusState::Closing => "it shuts down",
        XenbusState::Closed => "it has closed",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUNCTION: PciDevice = PciDevice {
        segment: 0,
        bus: 0,
        devfn: 0,
    };

    fn access(command: Command, devfn: u8, value: u32, result: PciError) -> Operation {
        Operation {
            command: command as u32,
            function: PciDevice { devfn, ..FUNCTION },
            offset: 0x10,
            size: 4,
            value,
            result: Some(result),
            took: Duration::from_micros(10),
        }
    }

    #[test]
    fn accesses_are_summed_up_by_function_and_absent_ones_apart() {
        let operations = [
            access(Command::ConfRead, 0, 0, PciError::SUCCESS),
            access(Command::ConfWrite, 0, 0, PciError::ACCESS_DENIED),
            access(Command::ConfRead, 8, 0, PciError::DEV_NOT_FOUND),
            access(Command::EnableMsi, 0, 0, PciError::SUCCESS),
        ];
        let (functions, absent) = sum_up(&operations);
        assert_eq!(absent, 1);
        let times = vec![Duration::from_micros(10); 2];
        let expected = Sum {
            reads: 1,
            writes: 1,
            refused: 1,
            times,
        };
        assert_eq!(functions, BTreeMap::from([(FUNCTION, expected)]));
    }

    #[test]
    fn a_register_is_sized_by_ones_and_the_read_after_them() {
        let at = |offset, operation| Operation {
            offset,
            ..operation
        };
        let write = |offset, value| {
            at(
                offset,
                access(Command::ConfWrite, 0, value, PciError::SUCCESS),
            )
        };
        let read = |offset, value| {
            at(
                offset,
                access(Command::ConfRead, 0, value, PciError::SUCCESS),
            )
        };
        let operations = [
            read(0x10, 0xfe00_0004),
            write(0x10, u32::MAX),
            read(0x10, 0xffff_c004),
            write(0x10, 0xfe00_0004),
            // its upper half
            write(0x14, u32::MAX),
            read(0x14, u32::MAX),
            // not there
            write(0x18, u32::MAX),
            read(0x18, 0),
            write(0x1c, u32::MAX),
            read(0x1c, 0xffff_ffe1),
            write(0x30, 0xffff_fffe),
            read(0x30, 0xfffe_0000),
            // no address register
            write(0x40, u32::MAX),
            read(0x40, u32::MAX),
        ];
        let found: Vec<_> = sizings(&operations).iter().map(Sizing::result).collect();
        let expected = [("BAR 0", 0x4000), ("BAR 3", 32), ("ROM", 0x2_0000)];
        assert_eq!(found, expected.map(|(name, size)| (name.to_owned(), size)));
        assert!(sizings(&operations[..2]).is_empty());
    }
}
