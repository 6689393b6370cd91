//! What the way from a guest to its device and back costs, without an emulated CPU: configuration reads of a guest of the embedded platform,
//! beside reads of this machine's own devices by sysfs. The device of the guest is a simulated one, which answers at once, so what the guest
//! waits for is the way. The order is A-B-B-A, over and over.
//!
//! `cargo bench -p pcibackd --bench round_trip`

#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pcibackd::config::Config;
use pcibackd::control::client;
use pcibackd::control::protocol::Request;
use pcibackd::daemon::Background;
use pcibackd::host::devices::for_xen;
use pcibackd::host::sim::{NVME, SimBus};
use xenbus::sim::{DomainKind, Frontend, Machine, PciOptions, Variant};

const READS: usize = 2000;
const ROUNDS: usize = 10;
/// The command and the status register.
const OFFSET: u16 = 4;

/// The median time of a read, in nanoseconds.
fn timed(mut read: impl FnMut()) -> u128 {
    let mut times: Vec<u128> = (0..READS)
        .map(|_| {
            let begin = Instant::now();
            read();
            begin.elapsed().as_nanos()
        })
        .collect();
    times.sort_unstable();
    times[READS / 2]
}

/// Configuration space of this machine's first device, if it has any.
fn own_device() -> Option<File> {
    let devices = std::fs::read_dir("/sys/bus/pci/devices").ok()?;
    let mut paths: Vec<PathBuf> = devices
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort_unstable();
    File::open(paths.first()?.join("config")).ok()
}

fn main() {
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::new(directory.path()).unwrap();
    let bus = SimBus::with_example_devices(&machine);
    let xen = Arc::new(machine.clone());
    let path = directory.path().to_owned();
    let daemon = Background::start(xen, bus, path, Config::default()).unwrap();
    let hide = Request::Hide {
        devices: vec![NVME.to_string()],
        force: false,
    };
    client::ask(directory.path(), &hide).unwrap();
    let domain = machine.create_domain("guest", DomainKind::Pv).unwrap();
    machine
        .pci_attach(domain, for_xen(NVME), &PciOptions::default())
        .unwrap();
    machine.unpause_domain(domain).unwrap();
    let mut frontend = Frontend::new(machine.guest(domain), Variant::Linux).unwrap();
    frontend.connect(Duration::from_secs(5)).unwrap();
    let function = frontend.functions().next().unwrap().address;
    let own = own_device();
    let mut figures: [Vec<u128>; 2] = Default::default();
    for _ in 0..ROUNDS {
        for way in [0, 1, 1, 0] {
            let time = match (way, &own) {
                (0, _) => timed(|| {
                    frontend.conf_read(function, OFFSET, 4).unwrap();
                }),
                (_, Some(file)) => timed(|| {
                    file.read_exact_at(&mut [0; 4], OFFSET.into()).unwrap();
                }),
                (_, None) => continue,
            };
            figures[way].push(time);
        }
    }
    let names = [
        "a guest's, through pcibackd",
        "this machine's own, by sysfs",
    ];
    for (times, name) in figures.iter_mut().zip(names) {
        times.sort_unstable();
        if let [least, ..] = times[..] {
            let median = times[times.len() / 2];
            println!("{name:<28}  median {median:6} ns, quietest {least:6} ns");
        }
    }
    drop(frontend);
    daemon.stop().unwrap();
}
