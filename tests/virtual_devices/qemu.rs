//! A guest whose own device model has functions where its virtio devices are to be.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::{fs, thread};

use nix::mount::{MsFlags, mount};
use xenbus::DomId;
use xenbus::sim::DomainKind;

use crate::asking::{add, shown, wait};
use crate::house::until;
use crate::storage::has_own_mounts;
use crate::with_rng;

/// Answers as QEMU does, with a function in each of these slots.
fn qemu(domain: DomId, slots: &[u8]) {
    let devices = slots.iter().map(|slot| {
        format!("{{\"bus\": 0, \"slot\": {slot}, \"class_info\": {{\"class\": 1, \"desc\": \"a card\"}}}}")
    });
    let devices = devices.collect::<Vec<_>>().join(", ");
    fs::create_dir_all("/var/run/xen").unwrap();
    let path = format!("/var/run/xen/qmp-libxl-{domain}");
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            writeln!(stream, "{{\"QMP\": {{}}}}").unwrap();
            for line in lines {
                let answer = match line.unwrap().contains("query-pci") {
                    true => format!("[{{\"bus\": 0, \"devices\": [{devices}]}}]"),
                    false => "{}".to_owned(),
                };
                writeln!(stream, "{{\"return\": {answer}}}").unwrap();
            }
        }
    });
}

#[test]
fn a_slot_that_qemu_has_is_refused_or_told_of() {
    // Where QEMU listens is the same for all tests.
    let run = || {
        mount(
            None::<&str>,
            "/run",
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
    };
    if !has_own_mounts() || run().is_err() {
        eprintln!("SKIPPED: no mount namespace here; run as root");
        return;
    }
    let house = with_rng("");
    let domain = house.machine.create_domain("web", DomainKind::Hvm).unwrap();
    until("it is served", || {
        let guests = shown(&house, None);
        guests.first().is_some_and(|guest| guest.state == "served")
    });
    // It starts after the toolstack has made the guest.
    qemu(domain, &[0, 0x1e, 0x1f]);
    until("the operator can see it", || {
        let reason = shown(&house, Some("web")).remove(0).reason;
        reason.is_some_and(|reason| reason.contains("slot 1f is taken by QEMU (a card)"))
    });
    let refused = wait(&house, "web").unwrap_err();
    assert!(refused.contains("slot 1f"), "{refused}");
    let refused = add(&house, "web", "type = \"rng\"").unwrap_err();
    assert!(refused.contains("slot 1e"), "{refused}");
    let slot = "type = \"rng\", slot = \"1d\"";
    assert_eq!(add(&house, "web", slot).unwrap(), ["slot 1d"]);
}
