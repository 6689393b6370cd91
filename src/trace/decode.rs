//! From an operation's numbers to the names of registers and fields. Pure.

use std::collections::BTreeSet;

use conf_space::address::Bdf;
use conf_space::overlay::Field;
use conf_space::registers::header;
use conf_space::{Resource, Width};
use xenbus::pciif::{Command, PciError};

use crate::control::traced::{Traced, TracedField, TracedRegister};
use crate::session::meter;
use crate::session::tap::Event;

/// Where a device's registers are, and what its BARs decode.
#[derive(Debug)]
pub struct Layout {
    /// The whole configuration space, in order of offsets.
    pub fields: Vec<Field>,
    /// BARs 0 to 5 and the expansion ROM.
    pub resources: [Resource; 7],
}

/// Names what guests do. Remembers which BARs are being sized.
#[derive(Debug, Default)]
pub struct Decoder {
    sizing: BTreeSet<(Bdf, u16)>,
}

impl Decoder {
    /// Names an operation of a guest.
    pub fn decode(&mut self, event: &Event, guest: (u16, &str), layout: Option<&Layout>) -> Traced {
        let command = event.command();
        let access = matches!(command, Some(Command::ConfRead | Command::ConfWrite));
        let done = event.error == PciError::SUCCESS;
        let value = match command {
            Some(Command::ConfWrite) => Some(event.value),
            Some(Command::ConfRead | Command::EnableMsi | Command::EnableMultiMsi) if done => {
                Some(event.result)
            }
            _ => None,
        };
        let registers = match (layout, event.device, value) {
            (Some(layout), Some(device), Some(value)) if access => {
                self.registers(event, device, layout, value)
            }
            _ => Vec::new(),
        };
        Traced {
            time_us: u64::try_from(event.time.as_micros()).unwrap_or(u64::MAX),
            domain: guest.0,
            guest: guest.1.to_owned(),
            device: event.device,
            seen_as: address(event.address),
            command: command.map_or(meter::UNKNOWN, Command::name).to_owned(),
            number: event.number,
            offset: access.then_some(event.offset),
            size: access.then_some(event.size),
            value,
            vectors: match command {
                Some(Command::EnableMsi) => Some(1),
                Some(Command::EnableMultiMsi) => Some(event.info),
                Some(Command::EnableMsix) => Some(event.value),
                _ => None,
            },
            registers,
            outcome: event.outcome.name().to_owned(),
            error: event.error.0,
            took_ns: u64::try_from(event.took.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    fn registers(
        &mut self,
        event: &Event,
        device: Bdf,
        layout: &Layout,
        value: u32,
    ) -> Vec<TracedRegister> {
        let width = u32::try_from(event.size).ok().and_then(Width::from_bytes);
        let (Ok(offset), Some(width)) = (u16::try_from(event.offset), width) else {
            return Vec::new();
        };
        let end = offset.saturating_add(width.bytes());
        let value = value & width.mask();
        let touched = layout.fields.iter().filter(|field| {
            !field.name.is_empty()
                && field.offset < end
                && offset < field.offset.saturating_add(field.length)
        });
        touched
            .map(|field| {
                let reached = part(width.mask(), offset, field);
                let value = part(value, offset, field);
                let fields = field
                    .bits
                    .iter()
                    .filter(|bits| bits.mask & reached == bits.mask);
                TracedRegister {
                    block: field.block.to_owned(),
                    name: field.name.to_owned(),
                    offset: field.offset,
                    value,
                    partial: field_width(field) & !reached != 0,
                    fields: fields
                        .filter(|bits| bits.of(value) != 0)
                        .map(|bits| TracedField {
                            name: bits.name.to_owned(),
                            value: bits.of(value),
                            flag: bits.mask.is_power_of_two(),
                        })
                        .collect(),
                    note: self.note(event, device, layout, field, value),
                }
            })
            .collect()
    }

    /// Sizing a BAR takes two operations: all ones are written, and what comes back tells the size.
    fn note(
        &mut self,
        event: &Event,
        device: Bdf,
        layout: &Layout,
        field: &Field,
        value: u32,
    ) -> Option<String> {
        const ADDRESS: u32 = 0xffff_f800;
        let bar = bar_at(field)?;
        let key = (device, field.offset);
        if event.command() == Some(Command::ConfWrite) {
            if value & ADDRESS == ADDRESS {
                self.sizing.insert(key);
                return Some("asks for its size".to_owned());
            }
            self.sizing.remove(&key);
            return None;
        }
        self.sizing.contains(&key).then(|| decodes(layout, bar))
    }
}

/// What reaches a register of the bits at `offset`.
fn part(bits: u32, offset: u16, field: &Field) -> u32 {
    let distance = |from: u16, to: u16| u32::from(to.saturating_sub(from)).saturating_mul(8);
    let moved = bits
        .checked_shr(distance(offset, field.offset))
        .unwrap_or(0)
        .checked_shl(distance(field.offset, offset))
        .unwrap_or(0);
    moved & field_width(field)
}

fn field_width(field: &Field) -> u32 {
    Width::from_bytes(field.length.into()).map_or(0, Width::mask)
}

/// The BAR's number; 6 for the expansion ROM.
fn bar_at(field: &Field) -> Option<usize> {
    let bars = header::BARS.iter().chain([&header::EXPANSION_ROM]);
    bars.into_iter()
        .position(|bar| bar.offset == field.offset)
        .filter(|_| field.block == header::TYPE_0.name)
}

fn decodes(layout: &Layout, bar: usize) -> String {
    let resource = |bar: usize| layout.resources.get(bar).copied();
    let lower = bar.checked_sub(1).and_then(resource);
    if lower.is_some_and(|lower| lower.is_64_bit()) {
        return "its upper half".to_owned();
    }
    let Some(resource) = resource(bar).filter(Resource::is_present) else {
        return "there is none".to_owned();
    };
    let kind = match (resource.is_io(), resource.is_64_bit()) {
        (true, _) => "I/O ports",
        (_, true) => "memory, 64-bit",
        (_, false) => "memory",
    };
    format!("{} of {kind}", bytes(resource.size))
}

fn bytes(size: u64) -> String {
    const UNITS: [(u32, &str); 3] = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = UNITS
        .iter()
        .find(|(power, _)| size.trailing_zeros() >= *power);
    match unit {
        Some((power, name)) => format!("{} {name}", size.wrapping_shr(*power)),
        None => format!("{size} bytes"),
    }
}

/// An address as the guest wrote it, which may be none.
fn address([segment, bus, devfn]: [u32; 3]) -> String {
    match (
        u16::try_from(segment),
        u8::try_from(bus),
        u8::try_from(devfn),
    ) {
        (Ok(segment), Ok(bus), Ok(devfn)) => Bdf::from_devfn(segment, bus, devfn).to_string(),
        _ => format!("segment {segment:#x} bus {bus:#x} devfn {devfn:#x}"),
    }
}
