//! What one guest does is its own affair.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use pcibackd::host::sim::{INTX_ONLY, NVME};
use xenbus::XenbusState;
use xenbus::pciif::{Command, PciError, PciOp};
use xenbus::sim::{BarKind, Frontend, GuestPlatform, Lies};
use xenbus::xenstore::Store;
use xenbus::{DomId, PciDevice};

use crate::house::{House, LONG, at};

const FIRST: PciDevice = at(0, 0);

struct Pair {
    house: House,
    bad: (DomId, Frontend),
    good: (DomId, Frontend),
}

fn pair() -> Pair {
    let house = House::impatient(&[NVME, INTX_ONLY]);
    let bad = house.boot(&[NVME]);
    let good = house.boot(&[INTX_ONLY]);
    Pair { house, bad, good }
}

/// Operations as of a driver that probes.
fn work(frontend: &mut Frontend, count: usize) {
    for _ in 0..count {
        assert_eq!(frontend.conf_read(FIRST, 0, 4).unwrap(), 0x8139_10ec);
        frontend.conf_write(FIRST, 0x0c, 1, 0x10).unwrap();
    }
}

/// A driver that behaves takes over.
fn reload(house: &House, (domain, frontend): &mut (DomId, Frontend)) {
    frontend.unload().unwrap();
    house.until_node(*domain, "state", "4");
    frontend.write_state("1").unwrap();
    house.until_node(*domain, "state", "3");
    frontend.publish().unwrap();
    house.until_node(*domain, "state", "4");
    frontend
        .wait_for_backend(XenbusState::Connected, LONG)
        .unwrap();
    assert_eq!(frontend.functions().count(), 1);
}

#[test]
fn a_guest_that_floods_its_port_does_not_hold_the_other_up() {
    let Pair {
        house,
        mut bad,
        mut good,
    } = pair();
    let (stop, events) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                bad.1.flood(16).unwrap();
                events.fetch_add(16, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        while events.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        work(&mut good.1, 200);
        stop.store(true, Ordering::Relaxed);
    });
    // The flooder itself is slowed down, and served.
    assert!(bad.1.conf_read(FIRST, 0, 4).is_ok());
    let operations = house.guest_line(good.0).unwrap().operations;
    assert!(operations >= 400, "{operations}");
}

#[test]
fn a_guest_with_a_slow_device_does_not_hold_the_other_up() {
    let Pair {
        house,
        mut bad,
        mut good,
    } = pair();
    house.bus.set_access_time(NVME, Duration::from_millis(200));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Of more than one access: the fields of the header lie side by side.
            bad.1.conf_read(FIRST, 0x3c, 4).unwrap();
            done.store(true, Ordering::Relaxed);
        });
        let mut operations = 0;
        while !done.load(Ordering::Relaxed) {
            work(&mut good.1, 1);
            operations += 1;
        }
        assert!(operations > 10, "{operations} meanwhile");
    });
}

#[test]
fn a_slow_reset_after_one_guest_does_not_hold_the_other_up() {
    let Pair {
        house,
        bad,
        mut good,
    } = pair();
    house.bus.set_reset_time(NVME, Duration::from_millis(300));
    drop(bad.1);
    house.machine.domain_shut_down(bad.0).unwrap();
    house.machine.destroy_domain(bad.0).unwrap();
    let mut operations = 0;
    while house.phase(NVME) != Some(pcibackd::host::record::Phase::Hidden) {
        work(&mut good.1, 1);
        operations += 1;
    }
    assert!(operations > 10, "{operations} meanwhile");
}

#[test]
fn garbage_in_the_page_harms_its_guest_alone() {
    let Pair {
        house,
        mut bad,
        mut good,
    } = pair();
    bad.1.set_op_timeout(Some(Duration::from_millis(5)));
    for seed in 0..50 {
        bad.1.scribble(seed * 0x9e37).unwrap();
        // No operation is this one: the page's answer is.
        let _ = bad.1.conf_read(FIRST, 0, 4);
        work(&mut good.1, 1);
    }
    bad.1.set_op_timeout(Some(LONG));
    reload(&house, &mut bad);
}

#[test]
fn an_operation_that_changes_while_it_is_served_is_served_as_it_was_once() {
    let Pair {
        house: _house,
        mut bad,
        mut good,
    } = pair();
    let read = |offset| PciOp {
        cmd: Command::ConfRead as u32,
        size: 4,
        offset,
        ..PciOp::default()
    };
    let elsewhere = PciOp {
        cmd: u32::MAX,
        domain: u32::MAX,
        bus: u32::MAX,
        devfn: u32::MAX,
        offset: i32::MIN,
        size: i32::MAX,
        value: u32::MAX,
        ..PciOp::default()
    };
    bad.1.set_op_timeout(Some(Duration::from_millis(50)));
    for _ in 0..50 {
        // Whatever the answer is. That it is dropped may be one.
        let _ = bad
            .1
            .operate_while_changing(&read(0), &[read(4), elsewhere, read(0x40)]);
        work(&mut good.1, 1);
    }
    bad.1.set_op_timeout(Some(LONG));
    assert_eq!(bad.1.conf_read(FIRST, 0, 4).unwrap(), 0x0010_1b36);
}

#[test]
fn operations_on_what_is_not_its_own_find_nothing() {
    let Pair {
        house: _house,
        mut bad,
        ..
    } = pair();
    for (domain, bus, devfn) in [
        (0, 0, 1),
        (0, 0, 8),
        (0, 1, 0),
        (1, 0, 0),
        (0, 0, 0x100),
        (0, 0x100, 0),
        (0x1_0000, 0, 0),
        (u32::MAX, u32::MAX, u32::MAX),
    ] {
        for cmd in 0..12 {
            let op = PciOp {
                cmd,
                domain,
                bus,
                devfn,
                size: 4,
                ..PciOp::default()
            };
            let answer = bad.1.operate(&op).unwrap();
            assert_eq!(answer.err, PciError::DEV_NOT_FOUND.0, "{op:?}");
        }
    }
}

#[test]
fn accesses_outside_of_configuration_space_are_refused() {
    let Pair {
        house: _house,
        mut bad,
        ..
    } = pair();
    for (offset, size) in [
        (-4, 4),
        (-256, 4),
        (i32::MIN, 4),
        (4096, 4),
        (i32::MAX, 1),
        (0, 3),
        (0, 0),
        (0, -1),
        (0, 8),
        (1, 4),
        (3, 2),
    ] {
        for cmd in [Command::ConfRead, Command::ConfWrite] {
            let op = PciOp {
                cmd: cmd as u32,
                offset,
                size,
                value: u32::MAX,
                ..PciOp::default()
            };
            let answer = bad.1.operate(&op).unwrap();
            assert_eq!(answer.err, PciError::INVALID_OFFSET.0, "{offset} {size}");
        }
    }
}

#[test]
fn a_guest_that_lies_in_xenstore_harms_itself_alone() {
    let Pair {
        house,
        mut bad,
        mut good,
    } = pair();
    let huge = "9".repeat(2000);
    let texts = [
        "",
        "-1",
        "4294967296",
        "\u{0}",
        "7\n",
        "%s",
        "../../0",
        &huge,
    ];
    for text in texts {
        for node in ["state", "pci-op-ref", "event-channel", "magic"] {
            let path = format!("device/pci/0/{node}");
            bad.1.store().write(&path, text).unwrap();
        }
        let lies = Lies {
            reference: text.into(),
            port: text.into(),
            ..Lies::default()
        };
        bad.1.publish_with(&lies).unwrap();
        work(&mut good.1, 1);
    }
    // It even takes its directory away.
    let _ = bad.1.store().rm("device/pci/0");
    work(&mut good.1, 10);
    drop(bad.1);
    house.machine.domain_shut_down(bad.0).unwrap();
    house.machine.destroy_domain(bad.0).unwrap();
    house.until_gone(bad.0);
    house.until_free(NVME);
}

#[test]
fn a_guest_that_writes_its_state_without_end_does_not_hold_the_other_up() {
    let Pair {
        house,
        mut bad,
        mut good,
    } = pair();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for state in [4, 7, 4, 8, 2, 4].into_iter().cycle() {
                bad.1.write_state(&state.to_string()).unwrap();
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        work(&mut good.1, 200);
        stop.store(true, Ordering::Relaxed);
    });
    reload(&house, &mut bad);
}

#[test]
fn ports_are_the_guests_whose_device_has_them_and_answer_while_it_is_awake() {
    let Pair { house, bad, good } = pair();
    let (domain, mut frontend) = good;
    let function = frontend.function(FIRST).unwrap();
    let is_io = |bar: &&xenbus::sim::Bar| bar.kind == BarKind::Io;
    let bar = *function.bars.iter().find(is_io).unwrap();
    let power = function.capability(0x01).unwrap() + 4;
    let open = |domain| {
        let guest = house.machine.guest(domain);
        guest.open_window(bar.kind.space(), bar.address)
    };
    assert_eq!(open(bad.0).unwrap_err().errno(), Some(libc::EPERM));
    let window = open(domain).unwrap();
    assert_eq!((window.address, window.size), (bar.address, bar.size));
    let errno = || {
        let errors = [
            window.access.read(0, 2).err(),
            window.access.write(0, 1, 0).err(),
        ];
        errors.map(|error| error.and_then(|error| error.raw_os_error()))
    };
    // Decode is the host's to switch.
    frontend.conf_write(FIRST, 0x04, 2, 0).unwrap();
    assert_eq!(errno(), [None; 2]);
    frontend.conf_write(FIRST, power, 2, 3).unwrap();
    assert_eq!(errno(), [Some(libc::EIO); 2]);
    frontend.conf_write(FIRST, power, 2, 0).unwrap();
    assert_eq!(errno(), [None; 2]);
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    assert_eq!(errno(), [Some(libc::EPERM); 2]);
    house.until_free(INTX_ONLY);
    assert_eq!(errno(), [Some(libc::EPERM); 2]);
}
