//! The directory that is ours, used as toolstacks use it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use super::*;

/// As `libxl` does it: one open for writing, one write of the twelve characters.
fn write(path: &Path, text: &str) -> Result<(), Errno> {
    let error = |error: io::Error| Errno::from_raw(error.raw_os_error().unwrap());
    let mut file = File::options().write(true).open(path).map_err(error)?;
    assert_eq!(file.write(text.as_bytes()).map_err(error)?, text.len());
    Ok(())
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// What `xl pci-assignable-list` shows.
fn assignable(machine: &Machine) -> Vec<String> {
    names(&machine.drivers().join("pciback"))
        .into_iter()
        .filter(|name| name.contains(':'))
        .collect()
}

#[test]
fn a_device_is_made_assignable_and_taken_back_the_way_libxl_does_it() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (_memory, _served) = machine.facade();
    let device = "0000:00:05.0";
    assert_eq!(assignable(&machine), [""; 0]);
    assert_eq!(
        fs::symlink_metadata(machine.pciback(device))
            .unwrap_err()
            .kind(),
        io::ErrorKind::NotFound
    );

    // pci-assignable-add: unbind from the driver, then slots, new_slot, bind
    let driver = fs::canonicalize(machine.path("bus/pci/devices/0000:00:05.0/driver")).unwrap();
    write(&driver.join("unbind"), device).unwrap();
    assert_eq!(fs::read_to_string(machine.pciback("slots")).unwrap(), "");
    write(&machine.pciback("new_slot"), device).unwrap();
    assert_eq!(
        fs::read_to_string(machine.pciback("slots")).unwrap(),
        "0000:00:05.0\n"
    );
    write(&machine.pciback("bind"), device).unwrap();
    assert_eq!(assignable(&machine), [device]);
    assert!(
        fs::symlink_metadata(machine.pciback(device))
            .unwrap()
            .is_symlink()
    );
    assert_eq!(
        fs::canonicalize(machine.pciback(device)).unwrap(),
        fs::canonicalize(machine.path("devices/pci0000:00/0000:00:05.0")).unwrap()
    );

    // pci-assignable-remove
    write(&machine.pciback("unbind"), device).unwrap();
    write(&machine.pciback("remove_slot"), device).unwrap();
    assert_eq!(fs::read_to_string(machine.pciback("slots")).unwrap(), "");
    assert_eq!(assignable(&machine), [""; 0]);
    assert_eq!(
        fs::read_link(machine.pciback(device)).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
}

#[test]
fn the_link_of_a_device_is_the_one_that_the_kernel_would_make() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (memory, _served) = machine.facade();
    memory
        .lists
        .lock()
        .unwrap()
        .seized
        .insert("0000:00:06.1".parse().unwrap());
    assert_eq!(
        fs::read_link(machine.pciback("0000:00:06.1")).unwrap(),
        Path::new("../../../../devices/pci0000:00/0000:00:06.1")
    );
}

#[test]
fn whoever_writes_gets_the_errno() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (_memory, _served) = machine.facade();
    for (file, text, errno) in [
        ("bind", "0000:00:05.0", Errno::ENODEV),
        ("bind", "nonsense", Errno::ENODEV),
        ("unbind", "0000:00:05.0", Errno::ENODEV),
        ("unbind", "", Errno::ENODEV),
        ("new_slot", "0000:00:05", Errno::EINVAL),
        ("new_slot", "0000:00:05.0 0000:00:06.0", Errno::EINVAL),
        ("new_slot", "\u{fffd}", Errno::EINVAL),
        ("remove_slot", "0000:00:05.0", Errno::ENOENT),
        ("permissive", "0000:00:05.0", Errno::ENODEV),
        ("permissive", "*", Errno::EINVAL),
        ("allow_interrupt_control", "0000:00:05.0", Errno::ENODEV),
        ("quirks", "0000:00:05.0-10:3:1", Errno::EINVAL),
        ("quirks", "0000:00:05.0-10:2:1", Errno::ENODEV),
        ("do_flr", "0", Errno::EINVAL),
        ("slots", "0000:00:05.0", Errno::EACCES),
        ("irq_handler_state", "0000:00:05.0", Errno::ENOENT),
        ("new_id", "8086 10d3", Errno::ENOENT),
    ] {
        // nothing written at all does not reach a file system
        if text.is_empty() {
            continue;
        }
        assert_eq!(
            write(&machine.pciback(file), text),
            Err(errno),
            "{text:?} to {file}"
        );
    }
    assert_eq!(
        File::open(machine.pciback("bind"))
            .unwrap_err()
            .raw_os_error(),
        Some(Errno::EACCES as i32)
    );
}

#[test]
fn a_shell_writes_and_reads_the_files() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (memory, _served) = machine.facade();
    let script = "set -e; cd \"$1\"; echo 00:05.0 > new_slot; echo 0000:00:05.0 > bind; echo 0000:00:05.0 >> permissive
        echo 0000:00:05.0 > allow_interrupt_control; echo 00:05.0-c8:2:ff00 > quirks; echo 0000:00:05.0 > do_flr
        echo 0000:00:05.0 > irq_handler_state
        cat slots permissive allow_interrupt_control quirks irq_handlers";
    let output = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(machine.drivers().join("pciback"))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    let device = "0000:00:05.0\n";
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("{device}{device}{device}{device}\t\t000000c8:2:0000ff00\n0000:00:05.0:on\n")
    );
    assert_eq!(
        memory.lists.lock().unwrap().resets,
        ["0000:00:05.0".parse().unwrap()]
    );
}

#[test]
fn a_wildcard_means_the_devices_that_are_there() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (_memory, _served) = machine.facade();
    write(&machine.pciback("new_slot"), "00:06.*").unwrap();
    assert_eq!(
        fs::read_to_string(machine.pciback("slots")).unwrap(),
        "0000:00:06.0\n0000:00:06.1\n"
    );
    assert_eq!(
        write(&machine.pciback("new_slot"), "00:1e.*"),
        Err(Errno::ENODEV)
    );
    write(&machine.pciback("remove_slot"), "0000:00:*.*").unwrap();
    assert_eq!(fs::read_to_string(machine.pciback("slots")).unwrap(), "");
    assert_eq!(
        write(&machine.pciback("remove_slot"), "00:06.*"),
        Err(Errno::ENOENT)
    );
}

#[test]
fn the_directory_looks_like_a_driver_of_the_kernel() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (_memory, _served) = machine.facade();
    let files = [
        "allow_interrupt_control",
        "bind",
        "do_flr",
        "irq_handler_state",
        "irq_handlers",
        "new_slot",
        "permissive",
        "quirks",
        "remove_slot",
        "slots",
        "unbind",
    ];
    assert_eq!(names(&machine.drivers().join("pciback")), files);
    let mode = |name| {
        fs::metadata(machine.pciback(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777
    };
    assert_eq!(
        (mode("bind"), mode("slots"), mode("permissive"), mode("")),
        (0o200, 0o444, 0o644, 0o755)
    );
    assert_eq!(fs::metadata(machine.pciback("slots")).unwrap().len(), 4096);
}

#[test]
fn only_root_writes_and_everybody_reads() {
    use std::os::unix::process::CommandExt;
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (_memory, _served) = machine.facade();
    let as_nobody = |script: &str| {
        let mut command = Command::new("sh");
        command
            .args(["-c", script, "sh"])
            .arg(machine.drivers())
            .uid(65534)
            .gid(65534)
            .output()
            .unwrap()
    };
    assert!(
        as_nobody("cat \"$1\"/pciback/slots && ls -l \"$1\" \"$1\"/e1000e")
            .status
            .success()
    );
    for file in ["pciback/new_slot", "pciback/permissive", "e1000e/unbind"] {
        let output = as_nobody(&format!("echo 0000:00:05.0 > \"$1\"/{file}"));
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("Permission denied"),
            "{file}: {output:?}"
        );
    }
}

#[test]
fn more_devices_than_fit_into_a_page_are_all_listed() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (memory, _served) = machine.facade();
    let all: BTreeSet<Bdf> = (0..=255)
        .flat_map(|bus| (0..8).map(move |function| Bdf::from_devfn(1, bus, function)))
        .collect();
    {
        let mut lists = memory.lists.lock().unwrap();
        (lists.seized, lists.slots) = (all.clone(), all.clone());
    }
    let expected: Vec<String> = all.iter().map(Bdf::to_string).collect();
    assert_eq!(assignable(&machine), expected);
    let slots = fs::read_to_string(machine.pciback("slots")).unwrap();
    assert_eq!(slots.lines().collect::<Vec<&str>>(), expected);
}

#[test]
fn a_slow_request_holds_up_nobody_else() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (memory, _served) = machine.facade();
    let slow: Bdf = "0000:00:05.0".parse().unwrap();
    memory.lists.lock().unwrap().slow.insert(slow);
    std::thread::scope(|scope| {
        let resets: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| write(&machine.pciback("do_flr"), "0000:00:05.0")))
            .collect();
        eventually("a reset is under way", || memory.waiting() > 0);
        // the directory, our files, other drivers' files, another request
        assert_eq!(assignable(&machine), [""; 0]);
        write(&machine.pciback("new_slot"), "0000:00:06.0").unwrap();
        write(&machine.pciback("bind"), "0000:00:06.0").unwrap();
        assert_eq!(assignable(&machine), ["0000:00:06.0"]);
        assert_eq!(
            fs::read_to_string(machine.pciback("slots")).unwrap(),
            "0000:00:06.0\n"
        );
        write(&machine.drivers().join("igb/bind"), "0000:00:06.1").unwrap();
        assert!(names(&machine.drivers()).contains(&"e1000e".to_owned()));
        assert!(memory.waiting() > 0);
        memory.let_go();
        for reset in resets {
            reset.join().unwrap().unwrap();
        }
    });
    assert_eq!(memory.lists.lock().unwrap().resets, [slow; 3]);
}

#[test]
fn other_users_cannot_open_so_much_that_root_gets_nothing() {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::CommandExt;
    use std::process::Stdio;
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (_memory, _served) = machine.facade();
    // Opens as much as it can, says how much, and holds it.
    let script =
        "for i in {1..300}; do { exec {fd}<\"$1\"; } 2>/dev/null || break; done; echo $i; read";
    let mut nobody = Command::new("bash")
        .args(["-c", script, "bash"])
        .arg(machine.pciback("slots"))
        .uid(65534)
        .gid(65534)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::new(nobody.stdout.as_mut().unwrap())
        .read_line(&mut first)
        .unwrap();
    assert_eq!(first.trim(), "257");
    assert!(fs::read_to_string(machine.pciback("slots")).is_ok());
    nobody.kill().unwrap();
    nobody.wait().unwrap();
}
