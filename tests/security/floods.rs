//! What a guest can make the daemon do without end: XSA-43, XSA-130, XSA-332, XSA-349.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use conf_space::Bdf;
use log::{LevelFilter, Log, Metadata, Record};
use pcibackd::config::Config;
use pcibackd::host::sim::{FunctionBuilder, NVME};
use xenbus::pciif::Command;
use xenbus::sim::{DomainKind, MachineOptions};
use xenbus::xenstore::Store;

use crate::guest::{Guest, op};
use crate::house::{House, at};
use crate::mortal::Deed;

/// All that any daemon of this process has logged.
static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Collector;

impl Log for Collector {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        LINES.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

/// Has all that is logged from now on kept in [`LINES`].
fn collect() {
    static START: Once = Once::new();
    START.call_once(|| {
        log::set_logger(&Collector).unwrap();
        log::set_max_level(LevelFilter::Info);
    });
}

fn count(deed: Deed, house: &House) -> Arc<AtomicUsize> {
    let counter = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&counter);
    house.life().witness(move |done| {
        if *done == deed {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    counter
}

/// Fails when `refused` in session/operation.rs logs whatever the limit says, when `tell_of_dropped_write` there tells each time, or when
/// `show` in session/mod.rs or `fail` in session/connection.rs do not ask their limit.
#[test]
fn xsa_43_a_guest_cannot_flood_the_log() {
    collect();
    // A device and a number that no other test's guest has.
    const CARD: Bdf = Bdf::from_devfn(0, 0x43, 0);
    let house = House::new(&[]);
    house.bus.add(
        FunctionBuilder::new(CARD, 0x10ec, 0x8139, 0x02_0000)
            .memory_bar(0, 0x1000)
            .power_management(false)
            .intx(19),
    );
    house.hide(&[CARD]);
    while house
        .machine
        .create_domain("another", DomainKind::Pv)
        .unwrap()
        .0
        < 430
    {}
    let mut guest = Guest::connected(&house, &[CARD]);
    let first = at(0, 0);
    for round in 0..60 {
        for command in [
            Command::EnableMsi,
            Command::EnableMsix,
            Command::EnableMultiMsi,
            Command::DisableMsi,
        ] {
            guest.operate(&op(command, first, 0, 0, round));
        }
        for offset in [0x00, 0x2c, 0x3c, 0x60, 0xfc] {
            guest.write_config(first, offset, 4, round);
        }
        // Asleep, and awake again with its configuration lost.
        guest.write_config(first, 0x44, 2, 3);
        guest.write_config(first, 0x44, 2, 0);
        guest.operate(&op(Command::ConfRead, at(7, 0), -1, 99, round));
    }
    // Closes, comes back, and speaks something that we do not.
    for round in 0..9 {
        // What was connected is connectable again at once; what was being closed is closed.
        let closed = if round == 0 { "4" } else { "6" };
        for (node, value, answer) in [
            ("state", "6", closed),
            ("state", "1", "3"),
            ("magic", "8", "3"),
            ("state", "3", "5"),
        ] {
            let path = format!("device/pci/0/{node}");
            guest.store.write(&path, value).unwrap();
            house.until_node(guest.domain, "state", answer);
        }
    }
    let (domain, device) = (format!("domain {}:", guest.domain), CARD.to_string());
    let lines = LINES.lock().unwrap().clone();
    let of_it: Vec<&String> = lines
        .iter()
        .filter(|line| line.starts_with(&domain) || line.starts_with(&device))
        .collect();
    assert!(!of_it.is_empty());
    assert!(of_it.len() <= 20, "{}: {of_it:#?}", of_it.len());
}

/// Fails when `carry_out` in session/operation.rs gives each `EnableMsix` that is refused a limit of its own.
#[test]
fn xsa_130_a_guest_cannot_flood_the_log_by_failing_msix() {
    collect();
    // A device that no other test has.
    const CARD: Bdf = Bdf::from_devfn(0, 0x82, 0);
    let options = MachineOptions {
        extra_pirqs: 2,
        ..MachineOptions::default()
    };
    let house = House::with(Config::default(), options, &[]);
    house.bus.add(
        FunctionBuilder::new(CARD, 0x8086, 0x10d3, 0x02_0000)
            .memory_bar(0, 0x4000)
            .power_management(false)
            .msix(4, 0, 0x2000)
            .express(),
    );
    house.hide(&[CARD]);
    let guest = Guest::connected(&house, &[CARD]);
    let first = at(0, 0);
    let enable = |count: u32, entries: &[u16]| {
        let mut request = op(Command::EnableMsix, first, 0, 0, count);
        for (slot, entry) in request.msix_entries.iter_mut().zip(entries) {
            slot.entry = *entry;
        }
        assert_ne!(guest.operate(&request).err, 0, "{entries:?}");
    };
    for _ in 0..50 {
        // More than Xen has PIRQs for, twice the same, none of the table's, more than a request has room for.
        enable(3, &[0, 1, 2]);
        enable(2, &[1, 1]);
        enable(1, &[4]);
        enable(1, &[u16::MAX]);
        enable(u32::MAX, &[0]);
    }
    let device = CARD.to_string();
    let lines = LINES.lock().unwrap().clone();
    let of_it = lines.iter().filter(|line| line.contains(&device)).count();
    assert!(
        (1..=20).contains(&of_it),
        "{of_it} lines about 250 failures"
    );
}

/// Fails when `Link::serve` in session/link.rs unmasks at once whatever the event was good for.
#[test]
fn xsa_332_a_guest_that_sends_events_for_nothing_is_slowed_down() {
    let house = House::new(&[NVME]);
    let guest = Guest::connected(&house, &[NVME]);
    let unmasked = count(Deed::Unmask, &house);
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(300) {
        guest.notify();
    }
    // 20 at once and then one in 50 ms, and those that came with an operation before.
    let allowed = 25 + start.elapsed().as_millis() as usize / 50;
    let unmasked = unmasked.load(Ordering::Relaxed);
    assert!(unmasked <= allowed, "{unmasked}, {allowed} allowed");
    assert_eq!(guest.read(at(0, 0), 0, 4).value, 0x0010_1b36);
}

/// Fails when `Session::run` in session/mod.rs looks at the nodes whenever one has changed, without asking `looks`.
#[test]
fn xsa_349_a_guest_that_writes_its_nodes_without_end_makes_little_work() {
    let house = House::new(&[NVME]);
    let mut guest = Guest::connected(&house, &[NVME]);
    let requests = count(Deed::Request, &house);
    let start = Instant::now();
    for round in 0u32.. {
        let (path, value) = (format!("device/pci/0/state/{round}"), "x".repeat(20));
        guest.store.write("device/pci/0/state", "4").unwrap();
        guest.store.write(&path, value).unwrap();
        guest.store.rm(&path).unwrap();
        if start.elapsed() > Duration::from_millis(500) {
            break;
        }
    }
    // 50 looks at once and then one in 50 ms; each is a handful of requests.
    let allowed = 8 * (55 + start.elapsed().as_millis() as usize / 50);
    let requests = requests.load(Ordering::Relaxed);
    assert!(requests <= allowed, "{requests}, {allowed} allowed");
    assert_eq!(guest.read(at(0, 0), 0, 4).value, 0x0010_1b36);
}
