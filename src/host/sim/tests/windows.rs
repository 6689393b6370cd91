//! What guests reach of their devices' BARs.

use proptest::prelude::*;
use xenbus::sim::BarSpace;

use super::*;

/// The registers of the network card's ports, and of its memory.
const REGISTER: u64 = 0x00;
const VALUE: u64 = 0x04;
const LINK: u64 = 0x0008;
const LINK_UP: u64 = 0x83;
const CAUSE_SET: u64 = 0x1520;
const CAUSE: u64 = 0x1580;

#[test]
fn ports_reach_what_memory_does_and_interrupt_as_well() {
    let host = host();
    let guest = host.machine.guest(host.assign(NIC));
    let (memory, ports) = (host.bar(NIC, 0), host.bar(NIC, 2));
    let memory = guest.open_window(BarSpace::Memory, memory).unwrap().access;
    let ports = guest.open_window(BarSpace::Io, ports + 4).unwrap();
    assert_eq!((ports.address, ports.size), (host.bar(NIC, 2), 0x20));
    let ports = ports.access;
    ports.write(REGISTER, 4, LINK).unwrap();
    assert_eq!(ports.read(VALUE, 4).unwrap(), LINK_UP);
    assert_eq!(ports.read(VALUE, 1).unwrap(), LINK_UP);
    assert_eq!(ports.read(VALUE + 2, 2).unwrap(), 0);
    assert_eq!(memory.read(LINK, 8).unwrap(), LINK_UP);
    ports.write(REGISTER, 4, CAUSE_SET).unwrap();
    // A register takes four bytes at a time.
    ports.write(VALUE, 1, 0x1).unwrap();
    ports.write(VALUE, 4, 0x6).unwrap();
    assert_eq!(memory.read(CAUSE, 4).unwrap(), 0x6);
    let refused = ports.read(REGISTER, 8).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn a_device_that_sleeps_or_does_not_decode_answers_nobody() {
    let host = host();
    let guest = host.machine.guest(host.assign(NIC));
    let open = |space, bar| {
        let window = guest.open_window(space, host.bar(NIC, bar)).unwrap();
        window.access
    };
    let (memory, ports) = (open(BarSpace::Memory, 0), open(BarSpace::Io, 2));
    let answers = || {
        [&memory, &ports].map(|window| match window.read(0, 4) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO));
                assert!(window.write(0, 4, 0).is_err());
                false
            }
        })
    };
    let config = host.config(NIC);
    for (command, expected) in [(0, [false; 2]), (1, [false, true]), (2, [true, false])] {
        config.write(0x04, Width::Two, command).unwrap();
        assert_eq!(answers(), expected);
    }
    config.write(0x04, Width::Two, 3).unwrap();
    assert_eq!(answers(), [true; 2]);
    host.set_bits(NIC, host.find(NIC, CapabilityId::POWER_MANAGEMENT) + 4, 3);
    assert_eq!(answers(), [false; 2]);
}

#[test]
fn what_a_guest_had_open_is_the_next_ones_alone() {
    let host = host();
    let domain = host.assign(NIC);
    let guest = host.machine.guest(domain);
    let ports = host.bar(NIC, 2);
    let before = guest.open_window(BarSpace::Io, ports).unwrap().access;
    before.write(REGISTER, 4, LINK).unwrap();
    host.machine.deassign_device(domain, xen(NIC)).unwrap();
    let next = host.machine.create_domain("next", DomainKind::Pv).unwrap();
    host.machine.assign_device(next, xen(NIC)).unwrap();
    let next = host.machine.guest(next);
    let errno = before.read(REGISTER, 4).unwrap_err().raw_os_error();
    assert_eq!(errno, Some(libc::EPERM));
    let errno = before.write(REGISTER, 4, 0).unwrap_err().raw_os_error();
    assert_eq!(errno, Some(libc::EPERM));
    let refused = guest.open_window(BarSpace::Io, ports).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EPERM));
    let after = next.open_window(BarSpace::Io, ports).unwrap().access;
    assert_eq!(after.read(REGISTER, 4).unwrap(), LINK);
}

#[test]
fn whatever_a_guest_asks_of_windows_it_gets_what_its_bars_have_or_an_error() {
    let host = host();
    let guest = host.machine.guest(host.assign(NIC));
    let bars = [
        (BarSpace::Memory, 0, 0x2_0000),
        (BarSpace::Io, 2, 0x20),
        (BarSpace::Memory, 3, 0x4000),
    ]
    .map(|(space, bar, size)| (space, host.bar(NIC, bar), size));
    let others = [
        0,
        0x3c0,
        0xa_0000,
        host.bar(INTX_ONLY, 0),
        host.bar(NVME, 0),
    ];
    let mut places: Vec<u64> = others.into();
    for (_, start, size) in bars {
        places.extend([start, start + size / 2, start + size]);
    }
    let address = (prop::sample::select(places), -8i64..8)
        .prop_map(|(place, distance)| place.wrapping_add_signed(distance));
    let space = prop::sample::select(vec![BarSpace::Memory, BarSpace::Io]);
    let offset = prop_oneof![
        0..0x40u64,
        0x1500..0x1600u64,
        0x1_ffe0..0x2_0020u64,
        any::<u64>()
    ];
    let access = (address, space, offset, 0..=9u8, any::<u64>());
    proptest!(|((address, space, offset, width, value) in access)| {
        let own = bars.iter().find(|(kind, start, size)| {
            *kind == space && (*start..*start + size).contains(&address)
        });
        let Some((_, start, size)) = own else {
            let refused = guest.open_window(space, address).unwrap_err();
            prop_assert_eq!(refused.errno(), Some(libc::EPERM));
            return Ok(());
        };
        let window = guest.open_window(space, address).unwrap();
        prop_assert_eq!((window.address, window.size), (*start, *size));
        let widest = if space == BarSpace::Io { 4 } else { 8 };
        let fits = width.is_power_of_two()
            && width <= widest
            && offset.is_multiple_of(width.into())
            && offset.checked_add(width.into()).is_some_and(|end| end <= *size);
        let written = window.access.write(offset, width, value);
        let read = window.access.read(offset, width);
        for failed in [written.err(), read.err()] {
            let errno = failed.map(|error| error.raw_os_error());
            prop_assert_eq!(errno, (!fits).then_some(Some(libc::EINVAL)));
        }
    });
}
