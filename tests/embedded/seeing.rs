//! What the daemon shows of its guests' operations.

use std::time::Duration;

use pcibackd::control::protocol::{Errors, GuestLine};
use pcibackd::host::sim::{MSI_ONLY, NVME};
use xenbus::DomId;
use xenbus::pciif::{Command, PciOp};
use xenbus::sim::Frontend;

use crate::house::{House, at, until};

/// An operation is counted after its guest was told, so it may show a moment later.
fn counted(house: &House, domain: DomId, operations: u64) -> GuestLine {
    until(format!("{operations} operations are counted"), || {
        house.guest_line(domain).unwrap().operations >= operations
    });
    let line = house.guest_line(domain).unwrap();
    assert_eq!(line.operations, operations);
    line
}

/// The guest's operations until now, all counted: the last of them is one that nobody else makes.
fn so_far(house: &House, domain: DomId, frontend: &mut Frontend) -> GuestLine {
    let marker = PciOp {
        cmd: 98,
        ..PciOp::default()
    };
    frontend.operate(&marker).unwrap();
    until("the marker is counted", || {
        let line = house.guest_line(domain).unwrap();
        line.kinds.get("unknown") == Some(&1)
    });
    house.guest_line(domain).unwrap()
}

#[test]
fn operations_are_counted_by_kind_and_by_how_they_ended() {
    let house = House::new(&[NVME, MSI_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME, MSI_ONLY]);
    let before = so_far(&house, domain, &mut frontend);
    let mut operate = |cmd: u32, devfn: u32, offset, size, value| {
        let op = PciOp {
            cmd,
            devfn,
            offset,
            size,
            value,
            ..PciOp::default()
        };
        frontend.operate(&op).unwrap()
    };
    let (read, write) = (Command::ConfRead as u32, Command::ConfWrite as u32);
    for _ in 0..5 {
        operate(read, 0, 4, 4, 0);
    }
    operate(write, 0, 4, 2, 0x0006);
    operate(write, 0, 0x0e, 1, 0xff); // header type: no rule covers it
    operate(read, 0xf8, 0, 4, 0); // nothing there
    operate(read, 0, 3, 4, 0); // not aligned
    operate(99, 0, 0, 0, 0); // no command
    operate(Command::EnableMsix as u32, 8, 0, 0, 1); // it has MSI only
    let after = counted(&house, domain, before.operations + 11);
    let kind = |line: &GuestLine, name: &str| line.kinds.get(name).copied().unwrap_or(0);
    let more = |name| kind(&after, name) - kind(&before, name);
    assert_eq!(
        ["conf_read", "conf_write", "unknown", "enable_msix"].map(more),
        [7, 2, 1, 1]
    );
    let Errors {
        dropped,
        absent,
        refused,
        failed,
    } = after.errors;
    let was = before.errors;
    assert_eq!(
        [
            dropped - was.dropped,
            absent - was.absent,
            refused - was.refused,
            failed - was.failed
        ],
        [1, 1, 3, 0]
    );
}

#[test]
fn the_time_that_operations_take_is_shown() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let before = so_far(&house, domain, &mut frontend);
    assert!(before.latency.p50_ns > 0 && before.latency.p50_ns <= before.latency.max_ns);
    house.bus.set_access_time(NVME, Duration::from_millis(40));
    frontend.conf_read(at(0, 0), 4, 4).unwrap();
    let after = counted(&house, domain, before.operations + 1);
    assert!(after.latency.max_ns >= 40_000_000, "{:?}", after.latency);
    let slow = |line: &GuestLine| {
        let buckets = line.latency.buckets.iter();
        let slow = buckets.filter(|bucket| bucket.up_to_ns.is_none_or(|bound| bound > 40_000_000));
        slow.map(|bucket| bucket.operations).sum::<u64>()
    };
    assert_eq!(slow(&after), slow(&before) + 1);
}
