use super::*;
use crate::capabilities::{Capabilities, CapabilityId};
use crate::registers::{Block, msix as msix_registers};
use crate::resource::ResourceFlags;
use proptest::prelude::*;

const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1042,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: [0x01, 0x00, 0x00],
    revision: 1,
};
const TABLE: MsixLocation = MsixLocation { bar: 1, offset: 0 };
const PENDING: MsixLocation = MsixLocation {
    bar: 1,
    offset: 0x800,
};
const MEMORY: Bar = Bar {
    kind: BarKind::Memory32,
    size: 0x1000,
};
const WIDE: Bar = Bar {
    kind: BarKind::Memory64,
    size: 0x4000,
};

fn io(size: u64) -> Bar {
    let kind = BarKind::Io;
    Bar { kind, size }
}

/// BAR 0: 64 ports; BAR 1: 4 KiB; BARs 4 and 5: 16 KiB with 64-bit addresses.
fn function() -> Function {
    let builder = Builder::new(&IDENTITY).interrupt();
    let builder = builder.bar(0, io(64)).unwrap();
    let builder = builder.bar(1, MEMORY).unwrap().bar(4, WIDE).unwrap();
    builder.msix(5, TABLE, PENDING).unwrap().build()
}

fn read(function: &Function, register: &Register) -> u32 {
    let mut data = [0; 4];
    let length = usize::from(register.width.bytes());
    function.read(register.offset, &mut data[..length]);
    u32::from_le_bytes(data)
}

fn write(function: &mut Function, register: &Register, value: u32) -> Effects {
    let length = usize::from(register.width.bytes());
    function.write(register.offset, &value.to_le_bytes()[..length])
}

fn enable(function: &mut Function, bits: u16) -> Effects {
    write(function, &header::COMMAND, bits.into())
}

/// Start and kind of what each BAR decodes.
fn starts(function: &Function) -> [Option<u64>; BARS] {
    function
        .decoded()
        .map(|range| range.map(|range| range.start))
}

#[test]
fn the_header_says_what_the_function_is() {
    let function = function();
    assert_eq!(read(&function, &header::VENDOR_ID), 0x1af4);
    assert_eq!(read(&function, &header::DEVICE_ID), 0x1042);
    assert_eq!(read(&function, &header::BASE_CLASS), 1);
    assert_eq!(read(&function, &header::SUBSYSTEM_ID), 0x1100);
    assert_eq!(read(&function, &header::HEADER_TYPE), 0);
    assert_eq!(read(&function, &header::INTERRUPT_PIN), 1);
    assert_eq!(read(&function, &header::COMMAND), 0);
}

#[test]
fn bars_answer_with_their_size_and_type() {
    let mut function = function();
    for (index, size) in [
        (0, 0xffff_ffc1),
        (1, 0xffff_f000),
        (2, 0),
        (3, 0),
        (4, 0xffff_c004),
        (5, 0xffff_ffff),
    ] {
        let _ = write(&mut function, &header::BARS[index], u32::MAX);
        assert_eq!(read(&function, &header::BARS[index]), size, "BAR {index}");
    }
}

#[test]
fn sizing_never_decodes_even_with_decode_on() {
    let mut function = function();
    let _ = enable(&mut function, command::IO | command::MEMORY);
    let placed = [(0, 0xc000), (1, 0xf000_0000), (4, 0x8_0000), (5, 1)];
    for (index, address) in placed {
        let _ = write(&mut function, &header::BARS[index], address);
    }
    let before = starts(&function);
    assert_eq!(
        before,
        [
            Some(0xc000),
            Some(0xf000_0000),
            None,
            None,
            Some(0x1_0008_0000),
            None
        ]
    );
    for (index, address) in placed {
        let effects = write(&mut function, &header::BARS[index], u32::MAX);
        assert_eq!(effects, Effects::DECODE, "BAR {index}");
        let bar = if index == 5 { 4 } else { index };
        assert_eq!(function.decoded()[bar], None, "BAR {index}");
        let effects = write(&mut function, &header::BARS[index], address);
        assert_eq!(effects, Effects::DECODE, "BAR {index}");
        assert_eq!(starts(&function), before);
    }
}

#[test]
fn a_bar_decodes_only_while_the_command_register_says_so() {
    let mut function = function();
    assert_eq!(
        write(&mut function, &header::BARS[0], 0xc000),
        Effects::empty()
    );
    assert_eq!(
        write(&mut function, &header::BARS[1], 0xf000_0000),
        Effects::empty()
    );
    assert_eq!(enable(&mut function, command::IO), Effects::DECODE);
    assert_eq!(starts(&function)[..2], [Some(0xc000), None]);
    assert_eq!(
        function.decoded()[0],
        Some(Resource {
            start: 0xc000,
            size: 64,
            flags: ResourceFlags::IO
        })
    );
    assert_eq!(enable(&mut function, command::MEMORY), Effects::DECODE);
    assert_eq!(starts(&function)[..2], [None, Some(0xf000_0000)]);
    assert_eq!(
        enable(&mut function, command::MEMORY | command::BUS_MASTER),
        Effects::empty()
    );
}

#[test]
fn a_bar_that_moves_decodes_elsewhere() {
    let mut function = function();
    let _ = enable(&mut function, command::MEMORY);
    let _ = write(&mut function, &header::BARS[1], 0xf000_0000);
    assert_eq!(
        write(&mut function, &header::BARS[1], 0xf100_0fff),
        Effects::DECODE
    );
    assert_eq!(starts(&function)[1], Some(0xf100_0000));
    assert_eq!(
        write(&mut function, &header::BARS[1], 0xf100_0000),
        Effects::empty()
    );
}

#[test]
fn ports_beyond_the_last_one_are_not_decoded() {
    let mut function = function();
    let _ = enable(&mut function, command::IO);
    let _ = write(&mut function, &header::BARS[0], 0x0001_c001);
    assert_eq!(starts(&function)[0], None);
    let _ = write(&mut function, &header::BARS[0], 0xffc1);
    assert_eq!(starts(&function)[0], Some(0xffc0));
}

#[test]
fn the_capability_list_can_be_walked() {
    const LENGTH: Register = Register::new("length", 2, Width::One, "");
    let vendor = Block {
        name: "vendor",
        registers: &[&LENGTH],
    };
    let builder = Builder::new(&IDENTITY).bar(1, MEMORY).unwrap();
    let builder = builder.msix(1, TABLE, PENDING).unwrap();
    let value = (vendor.registers[0], 0x55);
    let (builder, second) = builder
        .capability(CapabilityId::VENDOR_SPECIFIC, &vendor, &[value])
        .unwrap();
    let (builder, third) = builder
        .capability(CapabilityId::VENDOR_SPECIFIC, &vendor, &[])
        .unwrap();
    let function = builder.build();
    let found = Capabilities::walk(&function.space, SIZE).unwrap();
    assert_eq!(found.faults, []);
    let found: Vec<_> = found
        .standard
        .iter()
        .map(|capability| (capability.id, capability.offset))
        .collect();
    assert_eq!(
        found,
        [
            (CapabilityId::MSI_X, 0x40),
            (CapabilityId::VENDOR_SPECIFIC, second),
            (CapabilityId::VENDOR_SPECIFIC, third)
        ]
    );
    assert_eq!(read(&function, &vendor.registers[0].at(second)), 0x55);
}

#[test]
fn a_function_without_capabilities_says_so() {
    let function = Builder::new(&IDENTITY).build();
    assert_eq!(
        Capabilities::walk(&function.space, SIZE).unwrap().standard,
        []
    );
}

#[test]
fn the_msix_capability_tells_the_size_and_the_places_and_takes_two_bits() {
    let mut function = function();
    let base = function.msix.unwrap();
    assert_eq!(read(&function, &msix_registers::TABLE.at(base)), 1);
    assert_eq!(read(&function, &msix_registers::PENDING.at(base)), 0x801);
    let control = msix_registers::CONTROL.at(base);
    assert_eq!(write(&mut function, &control, 0xffff), Effects::MSIX);
    assert_eq!(function.msix_control(), 0xc004);
}

#[test]
fn the_interrupt_line_shows_in_the_status_register_and_can_be_switched_off() {
    let mut function = function();
    function.set_interrupt_status(true);
    assert_eq!(read(&function, &header::STATUS), 0x18);
    function.set_interrupt_status(false);
    assert_eq!(read(&function, &header::STATUS), 0x10);
    assert_eq!(enable(&mut function, command::INTX_DISABLE), Effects::INTX);
    assert!(function.intx_disabled());
}

#[test]
fn what_cannot_be_is_not_built() {
    let builder = || Builder::new(&IDENTITY);
    let size = builder().bar(0, io(512)).unwrap_err();
    assert_eq!(
        size,
        BuildError::BarSize {
            index: 0,
            size: 512
        }
    );
    let behind = builder().bar(0, WIDE).unwrap().bar(1, MEMORY);
    assert_eq!(behind.unwrap_err(), BuildError::NoSuchBar { index: 1 });
    let before = builder().bar(1, MEMORY).unwrap().bar(0, WIDE);
    assert_eq!(before.unwrap_err(), BuildError::NoSuchBar { index: 0 });
    let last = builder().bar(5, WIDE).unwrap_err();
    assert_eq!(last, BuildError::NoSuchBar { index: 5 });
    let overlap = builder().bar(1, MEMORY).unwrap().msix(129, TABLE, PENDING);
    assert_eq!(overlap.unwrap_err(), BuildError::Overlap { bar: 1 });
    let outside = builder().bar(1, MEMORY).unwrap().msix(257, TABLE, PENDING);
    assert!(matches!(
        outside.unwrap_err(),
        BuildError::OutsideOfBar {
            bar: 1,
            offset: 0,
            ..
        }
    ));
    let none = builder().bar(1, MEMORY).unwrap().msix(0, TABLE, PENDING);
    assert_eq!(none.unwrap_err(), BuildError::Vectors { vectors: 0 });
}

#[test]
fn what_a_guest_wrote_is_restored() {
    let mut before = function();
    let _ = enable(&mut before, command::MEMORY | command::BUS_MASTER);
    let _ = write(&mut before, &header::BARS[4], 0xf000_0000);
    let mut after = function();
    assert!(after.restore(&before.registers()).contains(Effects::DECODE));
    assert_eq!(after.registers(), before.registers());
    assert_eq!(after.decoded(), before.decoded());
}

proptest! {
    #[test]
    fn any_access_in_pieces_is_the_same_as_in_one(
        writes in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 1..9), 0usize..9), 1..40),
    ) {
        let (mut whole, mut pieces) = (function(), function());
        for (offset, data, cut) in writes {
            // Mostly within the space, sometimes behind it.
            let offset = if offset & 0x8000 == 0 { offset & 0xff } else { offset };
            let (head, tail) = data.split_at(cut.min(data.len()));
            let _ = whole.write(offset, &data);
            let _ = pieces.write(offset, head);
            if let Some(behind) = offset.checked_add(u16::try_from(head.len()).unwrap()) {
                let _ = pieces.write(behind, tail);
            }
            prop_assert_eq!(whole.registers(), pieces.registers());
            let (mut one, mut two) = (vec![0; data.len()], vec![0; data.len()]);
            whole.read(offset, &mut one);
            for (at, byte) in (u32::from(offset)..).zip(&mut two) {
                match u16::try_from(at) {
                    Ok(at) => whole.read(at, std::slice::from_mut(byte)),
                    Err(_) => *byte = 0xff,
                }
            }
            prop_assert_eq!(one, two);
        }
    }

    #[test]
    fn what_is_decoded_is_aligned_and_within_its_address_space_whatever_is_written(
        writes in prop::collection::vec((0u16..0x30, any::<u32>()), 1..40),
    ) {
        let mut function = function();
        for (offset, value) in writes {
            let before = function.decoded();
            let effects = function.write(offset, &value.to_le_bytes());
            let after = function.decoded();
            prop_assert_eq!(before != after, effects.contains(Effects::DECODE));
            for range in after.iter().flatten() {
                prop_assert_eq!(range.start % range.size, 0);
                prop_assert!(range.start.checked_add(range.size).is_some());
                prop_assert!(!range.is_io() || range.start + range.size <= 0x1_0000);
            }
        }
    }
}
