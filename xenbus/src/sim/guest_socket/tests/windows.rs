//! What the BARs of a guest's devices decode, by requests 12 to 14.

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Barrier};

use proptest::prelude::*;

use super::*;
use crate::sim::test_bus::{BAR_SIZE, PORTS, first_port};

#[test]
fn a_guest_reaches_the_memory_of_its_own_devices_and_of_no_other() {
    let (setup, _bus, guest) = setup_with_devices(MachineOptions::default());
    for other in [bar(1), bar(0) - 1, bar(0) + BAR_SIZE, 0] {
        let refused = guest.open_window(BarSpace::Memory, other).unwrap_err();
        assert_eq!(refused.errno(), Some(libc::EPERM), "{other:#x}");
    }
    let window = guest.open_window(BarSpace::Memory, bar(0) + 0x123).unwrap();
    assert_eq!((window.address, window.size), (bar(0), BAR_SIZE));
    window
        .access
        .write(0x1008, 8, 0x1122_3344_5566_7788)
        .unwrap();
    window.access.write(0x100c, 1, 0xff).unwrap();
    assert_eq!(
        window.access.read(0x1008, 8).unwrap(),
        0x1122_33ff_5566_7788
    );
    assert_eq!(window.access.read(0x100a, 2).unwrap(), 0x5566);
    for (offset, width) in [
        (BAR_SIZE, 1),
        (BAR_SIZE - 4, 8),
        (2, 4),
        (0, 3),
        (0, 16),
        (0, 0),
    ] {
        let refused = window.access.read(offset, width).unwrap_err();
        assert_eq!(
            refused.raw_os_error(),
            Some(libc::EINVAL),
            "{offset:#x} {width}"
        );
        assert!(window.access.write(offset, width, 0).is_err());
    }
    assert!(window.access.read(u64::MAX, 1).is_err());
    setup
        .machine
        .deassign_device(setup.guest, address(0))
        .unwrap();
    let refused = window.access.read(0, 4).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
}

fn port(number: u8) -> u64 {
    first_port(address(number)).into()
}

#[test]
fn a_guest_reaches_the_ports_of_its_own_devices_and_of_no_other() {
    // What may be mapped is asked of memory alone.
    let options = MachineOptions {
        map_windows: true,
        ..MachineOptions::default()
    };
    let (setup, bus, guest) = setup_with_devices(options);
    for other in [port(1), port(0) - 1, port(0) + PORTS, bar(0), 0x3c0, 0] {
        let refused = guest.open_window(BarSpace::Io, other).unwrap_err();
        assert_eq!(refused.errno(), Some(libc::EPERM), "{other:#x}");
    }
    // The same number is no address of memory.
    let refused = guest.open_window(BarSpace::Memory, port(0)).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EPERM));

    let window = guest.open_window(BarSpace::Io, port(0) + 5).unwrap();
    assert_eq!((window.address, window.size), (port(0), PORTS));
    assert!(window.areas.is_empty());
    window.access.write(0x1c, 4, 0x1122_3344).unwrap();
    window.access.write(0x1d, 1, 0xff).unwrap();
    assert_eq!(window.access.read(0x1c, 4).unwrap(), 0x1122_ff44);
    assert_eq!(window.access.read(0x1e, 2).unwrap(), 0x1122);
    let memory = guest.open_window(BarSpace::Memory, bar(0)).unwrap();
    assert_eq!(memory.access.read(0x1c, 4).unwrap(), 0);
    for (offset, width) in [(0, 8), (PORTS, 1), (0x1e, 4), (PORTS - 4, 8), (0, 3)] {
        let refused = window.access.read(offset, width).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL), "{offset:#x}");
        let refused = window.access.write(offset, width, 0).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL), "{offset:#x}");
    }
    assert!(is_zero(&bus, 1));
    setup
        .machine
        .deassign_device(setup.guest, address(0))
        .unwrap();
    let refused = window.access.read(0, 4).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
}

/// Whether nobody has written to what a device's BARs decode.
fn is_zero(bus: &TestBus, device: u8) -> bool {
    bus.with(address(device), |found| {
        found.behind.iter().all(|file| {
            let mut bytes = vec![1; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes.iter().all(|byte| *byte == 0)
        })
    })
}

/// A number near others that mean something.
fn near(places: Vec<u64>) -> impl Strategy<Value = u64> {
    let beside = prop::sample::select(places).prop_flat_map(|place| {
        (0..0x20u64).prop_map(move |distance| place.wrapping_add(distance).wrapping_sub(0x10))
    });
    prop_oneof![8 => beside, 1 => any::<u64>()]
}

/// What a guest may ask of a window: address space, address, offset, width, value.
fn access() -> impl Strategy<Value = (BarSpace, u64, u64, u8, u64)> {
    let space = prop::sample::select(vec![BarSpace::Memory, BarSpace::Io]);
    let both = [bar, port].map(|place| [place(0), place(1)]).concat();
    let ends = [bar(0) + BAR_SIZE, port(0) + PORTS, 0x3c0, 0xa_0000];
    let address = near([&both[..], &ends].concat());
    let offset = near(vec![0x10, PORTS, BAR_SIZE]);
    let width = prop_oneof![8 => prop::sample::select(vec![1, 2, 4, 8]), 1 => any::<u8>()];
    (space, address, offset, width, any::<u64>())
}

#[test]
fn whatever_a_guest_asks_of_windows_it_reaches_what_is_its_own_and_nothing_else() {
    let (_setup, bus, guest) = setup_with_devices(MachineOptions::default());
    let memory = guest.open_window(BarSpace::Memory, bar(0)).unwrap();
    let ports = guest.open_window(BarSpace::Io, port(0)).unwrap();
    let errno = |error: &std::io::Error| error.raw_os_error();
    proptest!(|((space, address, offset, width, value) in access())| {
        let (window, start, size, widest) = match space {
            BarSpace::Memory => (&memory, bar(0), BAR_SIZE, 8),
            BarSpace::Io => (&ports, port(0), PORTS, 4),
        };
        let is_own = (start..start + size).contains(&address);
        match guest.open_window(space, address) {
            Ok(window) => {
                prop_assert!(is_own, "{space:?} {address:#x}");
                prop_assert_eq!((window.address, window.size), (start, size));
            }
            Err(refused) => {
                prop_assert!(!is_own, "{space:?} {address:#x}");
                prop_assert_eq!(refused.errno(), Some(libc::EPERM));
            }
        }
        let end = offset.checked_add(width.into());
        let fits = width.is_power_of_two()
            && width <= widest
            && offset.is_multiple_of(width.into())
            && end.is_some_and(|end| end <= size);
        let written = window.access.write(offset, width, value);
        let read = window.access.read(offset, width);
        if fits {
            written.unwrap();
            prop_assert_eq!(read.unwrap(), value & (u64::MAX >> (64 - 8 * u32::from(width))));
        } else {
            prop_assert_eq!(errno(&written.unwrap_err()), Some(libc::EINVAL));
            prop_assert_eq!(errno(&read.unwrap_err()), Some(libc::EINVAL));
        }
    });
    assert!(is_zero(&bus, 1));
}

#[test]
fn any_packet_about_windows_is_answered_and_other_devices_stay_as_they_are() {
    let (setup, bus, _guest) = setup_with_devices(MachineOptions::default());
    let socket = connected(&setup.socket);
    assert_eq!(raw(&socket, &[1, setup.guest.0.into()]), 0);
    for (space, place) in [(0, bar(0)), (1, port(0))] {
        assert_eq!(raw(&socket, &[12, space, place.try_into().unwrap(), 0]), 0);
    }
    let argument = prop_oneof![8 => 0..3u32, 1 => any::<u32>()];
    let places = [bar, port].map(|place| [place(0), place(1)]).concat();
    let number = prop_oneof![
        6 => prop::sample::select(vec![0, 1, 2, 4, 8, PORTS - 4, PORTS, BAR_SIZE - 8, BAR_SIZE]),
        4 => prop::sample::select(places),
        1 => any::<u64>(),
    ];
    let width = prop_oneof![4 => prop::sample::select(vec![1, 2, 4, 8]), 1 => any::<u64>()];
    let at = || (number.clone(), width.clone());
    // As many numbers as the request has, or not.
    let request = prop_oneof![
        3 => (Just(12u32), prop::collection::vec(number.clone(), 1)),
        3 => (Just(13u32), at().prop_map(|(offset, width)| vec![offset, width])),
        3 => (Just(14u32), (at(), any::<u64>()).prop_map(|((offset, width), value)| vec![offset, width, value])),
        1 => (12..=14u32, prop::collection::vec(number.clone(), 0..5)),
    ];
    let expected = [0, libc::EINVAL, libc::EPERM].map(|errno| u32::try_from(errno).unwrap());
    let done = AtomicBool::new(false);
    proptest!(|((kind, numbers) in request, argument in argument)| {
        let halves = |number: &u64| [*number as u32, (*number >> 32) as u32];
        let numbers: Vec<u32> = numbers.iter().flat_map(halves).collect();
        let errno = raw(&socket, &[&[kind, argument], &numbers[..]].concat());
        prop_assert!(expected.contains(&errno), "{errno}");
        done.fetch_or(errno == 0 && kind == 14, Ordering::Relaxed);
    });
    assert!(done.into_inner(), "nothing was written");
    assert!(is_zero(&bus, 1));
}

#[test]
fn device_memory_is_mapped_by_guests_only_where_the_machine_allows_it() {
    let (_setup, _bus, guest) = setup_with_devices(MachineOptions::default());
    assert!(
        guest
            .open_window(BarSpace::Memory, bar(0))
            .unwrap()
            .areas
            .is_empty()
    );

    let options = MachineOptions {
        map_windows: true,
        ..MachineOptions::default()
    };
    let (_setup, _bus, guest) = setup_with_devices(options);
    let window = guest.open_window(BarSpace::Memory, bar(0)).unwrap();
    let places: Vec<_> = window
        .areas
        .iter()
        .map(|area| (area.start, area.size))
        .collect();
    assert_eq!(places, [(0, 0x1000), (0x2000, 0x1000)]);
    window.access.write(0x2010, 4, 0x1234_5678).unwrap();
    let [_, area] = window.areas.try_into().unwrap();
    let mut bytes = [0; 4];
    std::fs::File::from(area.file)
        .read_exact_at(&mut bytes, area.offset + 0x10)
        .unwrap();
    assert_eq!(u32::from_le_bytes(bytes), 0x1234_5678);
}

#[test]
fn a_window_that_is_opened_again_is_the_same() {
    let (_setup, _bus, guest) = setup_with_devices(MachineOptions::default());
    for _ in 0..1000 {
        guest.open_window(BarSpace::Memory, bar(0)).unwrap();
    }
}

#[test]
fn an_access_that_is_under_way_while_the_device_changes_hands_is_refused() {
    let (setup, bus, guest) = setup_with_devices(MachineOptions::default());
    let other = setup
        .machine
        .create_domain("other", DomainKind::Pv)
        .unwrap();
    let window = guest.open_window(BarSpace::Memory, bar(0)).unwrap();
    let pause = Arc::new(Barrier::new(2));
    *lock(&bus.pause) = Some(Arc::clone(&pause));
    let written = std::thread::scope(|scope| {
        let written = scope.spawn(move || window.access.write(0, 4, 0x1234_5678));
        pause.wait();
        setup
            .machine
            .deassign_device(setup.guest, address(0))
            .unwrap();
        setup.machine.assign_device(other, address(0)).unwrap();
        pause.wait();
        written.join().unwrap()
    });
    assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EPERM));
    *lock(&bus.pause) = None;
    let other = SocketGuest::connect(&setup.socket, other).unwrap();
    let window = other.open_window(BarSpace::Memory, bar(0)).unwrap();
    assert_eq!(window.access.read(0, 4).unwrap(), 0);
}
