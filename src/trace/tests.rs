//! What operations are called.

use std::time::Duration;

use conf_space::memory::MemorySpace;
use conf_space::overlay::{Identity, Overlay};
use conf_space::{Bdf, ConfigSize, Resource, ResourceFlags, Width};
use xenbus::pciif::{Command, PciError};

use super::decode::{Decoder, Layout};
use crate::control::traced::{Traced, TracedRegister};
use crate::session::operation::Outcome;
use crate::session::tap::Event;

const DEVICE: Bdf = Bdf::from_devfn(0, 3, 0);

/// A device with a 64-bit BAR 0, I/O ports in BAR 2, and MSI at 0x50.
fn layout() -> Layout {
    let space = MemorySpace::new(ConfigSize::Conventional);
    space.set(0x06, Width::Two, 0x10);
    space.set(0x34, Width::One, 0x50);
    space.set(0x50, Width::Two, 0x0005);
    space.set(0x52, Width::Two, 0x0080);
    let mut resources = [Resource::ABSENT; 7];
    resources[0] = Resource {
        start: 0xf000_0000,
        size: 0x4000,
        flags: ResourceFlags::MEMORY | ResourceFlags::MEMORY_64,
    };
    resources[2] = Resource {
        start: 0x1000,
        size: 32,
        flags: ResourceFlags::IO,
    };
    let identity = Identity {
        bdf: DEVICE,
        vendor: 0x8086,
        device: 0x10d3,
        is_virtual_function: false,
        interrupt_line: 0,
        resources,
        config_size: ConfigSize::Conventional,
    };
    let overlay = Overlay::new(&identity, &space).unwrap();
    Layout {
        fields: overlay.fields().collect(),
        resources,
    }
}

fn event(command: Command, offset: i32, size: i32, value: u32) -> Event {
    Event {
        time: Duration::from_micros(1_700_000_000_123_456),
        took: Duration::from_micros(12),
        number: command as u32,
        address: [0, 0, 0],
        offset,
        size,
        value,
        info: 0,
        error: PciError::SUCCESS,
        result: value,
        device: Some(DEVICE),
        outcome: Outcome::Done,
    }
}

fn decode(decoder: &mut Decoder, event: &Event) -> Traced {
    decoder.decode(event, (7, "web"), Some(&layout()))
}

fn registers(command: Command, offset: i32, size: i32, value: u32) -> Vec<TracedRegister> {
    decode(
        &mut Decoder::default(),
        &event(command, offset, size, value),
    )
    .registers
}

fn fields(register: &TracedRegister) -> Vec<(&str, u32)> {
    let fields = register.fields.iter();
    fields
        .map(|field| (field.name.as_str(), field.value))
        .collect()
}

#[test]
fn a_write_of_the_command_register_names_its_bits() {
    let found = registers(Command::ConfWrite, 4, 2, 0x0407);
    assert_eq!(found.len(), 1);
    assert_eq!(
        (found[0].block.as_str(), found[0].name.as_str()),
        ("Header", "Command")
    );
    assert_eq!((found[0].value, found[0].partial), (0x0407, false));
    assert_eq!(
        fields(&found[0]),
        [
            ("I/O Space Enable", 1),
            ("Memory Space Enable", 1),
            ("Bus Master Enable", 1),
            ("Interrupt Disable", 1)
        ]
    );
}

#[test]
fn an_access_to_two_registers_names_both_with_their_own_values() {
    let found = registers(Command::ConfRead, 4, 4, 0x0010_0006);
    let names: Vec<_> = found
        .iter()
        .map(|found| (found.name.as_str(), found.value))
        .collect();
    assert_eq!(names, [("Command", 6), ("Status", 0x10)]);
    assert_eq!(fields(&found[1]), [("Capabilities List", 1)]);
}

#[test]
fn an_access_to_part_of_a_register_says_so_and_names_only_what_it_reached() {
    // The upper half of the command register, and of its fields those that lie in it.
    let found = registers(Command::ConfWrite, 5, 1, 0x04);
    assert_eq!((found[0].value, found[0].partial), (0x0400, true));
    assert_eq!(fields(&found[0]), [("Interrupt Disable", 1)]);
    let found = registers(Command::ConfRead, 0x12, 2, 0xf000);
    assert_eq!(
        (found[0].name.as_str(), found[0].value),
        ("BAR 0", 0xf000_0000)
    );
}

#[test]
fn a_capability_is_found_where_it_is_and_fields_of_several_bits_are_numbers() {
    let found = registers(Command::ConfWrite, 0x52, 2, 0x0021);
    assert_eq!(found[0].name, "MSI Message Control");
    assert_eq!(
        fields(&found[0]),
        [("MSI Enable", 1), ("Multiple Message Enable", 2)]
    );
    assert!(found[0].fields[0].flag && !found[0].fields[1].flag);
}

#[test]
fn sizing_a_bar_is_seen_as_such() {
    let mut decoder = Decoder::default();
    let mut note = |command, offset, value| {
        let traced = decode(&mut decoder, &event(command, offset, 4, value));
        traced.registers[0].note.clone()
    };
    let (read, write) = (Command::ConfRead, Command::ConfWrite);
    let text = |note: Option<String>| note.unwrap_or_default();
    assert_eq!(note(read, 0x10, 0xf000_0004), None);
    for (offset, size) in [
        (0x10, "16 KiB of memory, 64-bit"),
        (0x14, "its upper half"),
        (0x18, "32 bytes of I/O ports"),
        (0x1c, "there is none"),
    ] {
        assert_eq!(text(note(write, offset, u32::MAX)), "asks for its size");
        assert_eq!(text(note(read, offset, 0xffff_c004)), size);
        assert_eq!(note(write, offset, 0xf000_0000), None);
        assert_eq!(note(read, offset, 0xf000_0004), None);
    }
}

#[test]
fn what_makes_no_sense_is_told_as_it_came() {
    let mut decoder = Decoder::default();
    for (offset, size) in [
        (i32::MIN, 4),
        (-4, 4),
        (4, 0),
        (4, 3),
        (4, -1),
        (i32::MAX, 4),
        (0x1_0004, 4),
    ] {
        let traced = decode(
            &mut decoder,
            &event(Command::ConfRead, offset, size, u32::MAX),
        );
        assert_eq!((traced.offset, traced.size), (Some(offset), Some(size)));
        assert!(traced.registers.is_empty());
    }
    let unknown = Event {
        number: 99,
        address: [0x1_0000, 0, 0xffff_ffff],
        outcome: Outcome::Refused,
        error: PciError::NOT_IMPLEMENTED,
        device: None,
        ..event(Command::ConfRead, 0, 4, 0)
    };
    let traced = decoder.decode(&unknown, (7, "web"), None);
    assert_eq!((traced.command.as_str(), traced.number), ("unknown", 99));
    assert_eq!(traced.seen_as, "segment 0x10000 bus 0x0 devfn 0xffffffff");
    assert_eq!((traced.offset, traced.value), (None, None));
    assert_eq!((traced.outcome.as_str(), traced.error), ("refused", -4));
}

#[test]
fn a_refused_read_has_no_value() {
    let refused = Event {
        error: PciError::INVALID_OFFSET,
        outcome: Outcome::Refused,
        ..event(Command::ConfRead, 3, 4, 77)
    };
    assert_eq!(decode(&mut Decoder::default(), &refused).value, None);
}

#[test]
fn enabled_interrupts_are_told_with_their_vectors() {
    let mut decoder = Decoder::default();
    let msi = Event {
        result: 55,
        ..event(Command::EnableMsi, 0, 0, 0)
    };
    let traced = decode(&mut decoder, &msi);
    assert_eq!((traced.vectors, traced.value), (Some(1), Some(55)));
    let msix = event(Command::EnableMsix, 0, 0, 3);
    let traced = decode(&mut decoder, &msix);
    assert_eq!((traced.vectors, traced.value), (Some(3), None));
}
