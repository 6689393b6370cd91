//! What the hook for `pciback trace` costs an operation: configuration reads on the embedded platform, without the hook, with nobody who
//! traces, and with somebody who does. The order is A-B-C-C-B-A, over and over, so that what else the machine does falls on all of them.
//!
//! `cargo bench -p pcibackd --bench trace`

#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conf_space::topology::TopologyKind;
use pcibackd::host::devices::{Devices, Quarantine, for_xen};
use pcibackd::host::sim::{NVME, SimBus};
use pcibackd::rate_limit::RateLimit;
use pcibackd::session::exports::Exports;
use pcibackd::session::operation;
use pcibackd::session::telemetry::Telemetry;
use xenbus::Xen;
use xenbus::pciif::{Command, PciOp};
use xenbus::sim::{DomainKind, Machine, PciOptions};

const OPERATIONS: u32 = 20_000;
const ROUNDS: usize = 60;
const WAYS: [&str; 3] = ["no hook", "hook, off", "hook, on"];
/// What an operation is told to have taken. It is the session that looks at the clock, whether somebody traces or not.
const TOOK: Duration = Duration::from_micros(1);

struct Bench {
    exports: Exports,
    read: PciOp,
    limit: RateLimit,
    telemetry: Telemetry,
}

impl Bench {
    /// Nanoseconds for each operation.
    fn run(&mut self, way: usize) -> f64 {
        // Dropped at the end, which closes the tap.
        let _listener = (way == 2).then(|| self.telemetry.tap.listen());
        let begin = Instant::now();
        for _ in 0..OPERATIONS {
            let op = black_box(&self.read);
            let reply = operation::serve(&mut self.exports, op, &mut self.limit);
            match way {
                0 => self
                    .telemetry
                    .meter
                    .count(op.command(), reply.outcome, TOOK),
                _ => self.telemetry.record(op, &reply, TOOK),
            }
            black_box(reply);
        }
        begin.elapsed().as_nanos() as f64 / f64::from(OPERATIONS)
    }
}

fn main() {
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::new(directory.path()).unwrap();
    let xen: Arc<dyn Xen> = Arc::new(machine.clone());
    let bus = SimBus::with_example_devices(&machine);
    let records = directory.path().join("devices");
    let devices = Devices::open(bus, Arc::clone(&xen), Arc::default(), records).unwrap();
    let domain = machine.create_domain("guest", DomainKind::Pv).unwrap();
    let mut exports = Exports::new(domain, TopologyKind::Vpci, Arc::clone(&devices), xen);
    devices.hide(NVME, false, Quarantine::Ours).unwrap();
    machine
        .pci_attach(domain, for_xen(NVME), &PciOptions::default())
        .unwrap();
    let at = exports.add(NVME, None).unwrap();
    let mut bench = Bench {
        exports,
        read: PciOp {
            cmd: Command::ConfRead as u32,
            domain: at.segment().into(),
            bus: at.bus().into(),
            devfn: at.devfn().into(),
            offset: 4,
            size: 4,
            ..PciOp::default()
        },
        limit: RateLimit::new(10, Duration::from_secs(10)),
        telemetry: Telemetry::default(),
    };
    let mut times: [Vec<f64>; 3] = Default::default();
    for _ in 0..ROUNDS {
        for way in [0, 1, 2, 2, 1, 0] {
            times[way].push(bench.run(way));
        }
    }
    for (name, times) in WAYS.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let (best, median) = (times[0], times[times.len() / 2]);
        println!(
            "{name:<9}  median {median:6.1} ns, quietest {best:6.1} ns: {:.2} million operations a second",
            1e3 / median
        );
    }
}
