//! The files that packages install.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use conf_space::topology::TopologyKind;
use pcibackd::config::Config;

const RESERVE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/reserve");
const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/systemd");
const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/pcibackd.toml");

#[test]
fn the_example_configuration_changes_nothing() {
    let config = Config::load(Some(Path::new(EXAMPLE))).unwrap();
    let nothing = Config {
        asked_for: config.asked_for.clone(),
        ..Config::default()
    };
    assert_eq!(config, nothing);
}

#[test]
fn what_is_commented_out_in_the_example_is_valid_and_shows_the_defaults() {
    // Settings follow the mark at once, prose after a blank.
    let uncommented: String = fs::read_to_string(EXAMPLE)
        .unwrap()
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .filter(|line| !line.starts_with(' '))
        .map(|line| format!("{line}\n"))
        .collect();
    // It names another file, which has to be there.
    let quirks = tempfile::NamedTempFile::new().unwrap();
    let quirks = quirks.path().to_str().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, uncommented.replace("/etc/pciback/quirks", quirks)).unwrap();
    let config = Config::load(Some(file.path())).unwrap();
    assert_eq!(config.facade, Config::default().facade);
    assert_eq!(config.topology, Config::default().topology);
    assert_eq!(config.topology_of("database"), TopologyKind::Passthrough);
    assert!(!config.hide.is_empty());
}

/// A machine's sysfs, kernel command line and kernel log in a directory, for the script that reserves devices at boot.
struct Machine {
    root: tempfile::TempDir,
}

/// Where it is, its class, its numbers (vendor, device, subsystem vendor, subsystem).
const DEVICES: [(&str, &str, [&str; 4]); 8] = [
    ("pci0000:00/0000:00:05.0", "0x020000", E1000E),
    ("pci0000:00/0000:00:06.0", "0x020000", RTL8139),
    ("pci0000:00/0000:00:06.1", "0x020000", RTL8139),
    ("pci0000:00/0000:00:09.0", "0x060400", PORT),
    ("pci0000:00/0000:00:09.0/0000:0a:00.0", "0x020000", E1000E),
    ("pci0000:00/0000:00:0b.0", "0x060400", PORT),
    ("pci0000:00/0000:00:0b.0/0000:0c:00.0", "0x020000", RTL8139),
    ("pci0000:00/0000:00:0d.0", "0x068000", PORT),
];
const E1000E: [&str; 4] = ["0x8086", "0x10d3", "0x8086", "0xa01f"];
const RTL8139: [&str; 4] = ["0x10ec", "0x8139", "0x1af4", "0x1100"];
const PORT: [&str; 4] = ["0x1b36", "0x000c", "0x0000", "0x0000"];

impl Machine {
    fn new() -> Self {
        let machine = Self {
            root: tempfile::tempdir().unwrap(),
        };
        for directory in ["proc", "dev", "sys/bus/pci/devices"] {
            fs::create_dir_all(machine.path(directory)).unwrap();
        }
        fs::write(machine.path("dev/kmsg"), "").unwrap();
        for (place, class, ids) in DEVICES {
            let directory = machine.path("sys/devices").join(place);
            fs::create_dir_all(&directory).unwrap();
            let names = ["vendor", "device", "subsystem_vendor", "subsystem_device"];
            for (name, value) in names.into_iter().zip(ids) {
                fs::write(directory.join(name), format!("{value}\n")).unwrap();
            }
            fs::write(directory.join("class"), format!("{class}\n")).unwrap();
            fs::write(directory.join("driver_override"), "(null)\n").unwrap();
            let name = directory.file_name().unwrap();
            let link = machine.path("sys/bus/pci/devices").join(name);
            symlink(Path::new("../../../devices").join(place), link).unwrap();
        }
        machine
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    /// What `reserve` reserves, and what it says, with this list and this command line of the kernel.
    fn reserve(&self, list: &str, command_line: &str) -> (Vec<String>, String) {
        fs::write(self.path("list"), list).unwrap();
        fs::write(self.path("proc/cmdline"), format!("{command_line}\n")).unwrap();
        let output = Command::new("/bin/sh")
            .arg(RESERVE)
            .arg(self.path("list"))
            .env("PCIBACK_ROOT", self.root.path())
            .env("PATH", "/nonexistent")
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        let mut reserved: Vec<String> = fs::read_dir(self.path("sys/bus/pci/devices"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| fs::read_to_string(path.join("driver_override")).unwrap() == "pciback\n")
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        reserved.sort();
        (reserved, fs::read_to_string(self.path("dev/kmsg")).unwrap())
    }
}

/// Runs `pciback` with `--root`, and expects it to succeed.
fn pciback(root: &Path, arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_pciback"))
        .args(arguments)
        .arg("--root")
        .arg(root)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What is reserved at boot by this configuration, from `pciback persist --list` on.
fn reserved_by(configuration: &str) -> Vec<String> {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("etc/pciback")).unwrap();
    fs::write(root.path().join("etc/pciback/pcibackd.toml"), configuration).unwrap();
    let list = pciback(root.path(), &["persist", "--list"]);
    let json = pciback(root.path(), &["persist", "--list", "--json"]);
    let told: serde_json::Value = serde_json::from_str(&json).unwrap();
    let lines: Vec<&str> = list.lines().collect();
    let expected = serde_json::json!({"list": lines, "refused": [], "initramfs": "left"});
    assert_eq!(told, expected);
    Machine::new().reserve(&list, "root=/dev/sda ro").0
}

#[test]
fn a_device_is_hidden_at_boot_and_no_longer() {
    let root = tempfile::tempdir().unwrap();
    let read = |path: &str| fs::read_to_string(root.path().join(path));
    let (configuration, rules) = (
        "etc/pciback/pcibackd.toml",
        "etc/udev/rules.d/10-pciback.rules",
    );
    fs::create_dir_all(root.path().join("etc/pciback")).unwrap();
    fs::copy(EXAMPLE, root.path().join(configuration)).unwrap();
    let before = read(configuration).unwrap();

    let now_and_then = [
        "hide",
        "--persist",
        "--next-boot",
        "00:05.0",
        "00:0b.0/00.0",
    ];
    pciback(root.path(), &now_and_then);
    assert_eq!(
        read(configuration).unwrap(),
        format!("{before}hide = [\"0000:00:05.0\", \"0000:00:0b.0/00.0\"]\n")
    );
    assert!(read(rules).unwrap().contains("*/0000:00:05.0"));
    let list = pciback(root.path(), &["persist", "--list"]);
    assert_eq!(
        Machine::new().reserve(&list, "").0,
        ["0000:00:05.0", "0000:0c:00.0"]
    );

    pciback(
        root.path(),
        &["unhide", "--persist", "--next-boot", "00:05.0"],
    );
    assert!(!read(rules).unwrap().contains("*/0000:00:05.0"));
    pciback(
        root.path(),
        &["unhide", "--persist", "--next-boot", "00:0b.0/00.0"],
    );
    assert!(read(rules).is_err(), "a rules file without rules");
    assert_eq!(pciback(root.path(), &["persist", "--list"]), "");
}

#[test]
fn what_the_configuration_hides_is_reserved_at_boot() {
    for (entry, reserved) in [
        ("00:05.0", &["0000:00:05.0"][..]),
        ("00:06.*", &["0000:00:06.0", "0000:00:06.1"]),
        ("0a:*.*", &["0000:0a:00.0"]),
        ("00:05.0-00:06.0", &["0000:00:05.0", "0000:00:06.0"]),
        ("8086:10d3", &["0000:00:05.0", "0000:0a:00.0"]),
        ("8086:10d3:8086:a01f", &["0000:00:05.0", "0000:0a:00.0"]),
        ("8086:10d3:8086:0000", &[]),
        ("00:0b.0/00.0", &["0000:0c:00.0"]),
        ("00:0b.0/00.1", &[]),
        ("00:0d.0", &["0000:00:0d.0"]),
    ] {
        assert_eq!(
            reserved_by(&format!("hide = [\"{entry}\"]")),
            reserved,
            "{entry}"
        );
    }
    assert!(reserved_by("").is_empty());
}

#[test]
fn bridges_are_not_reserved_nor_what_is_behind_them() {
    assert!(reserved_by("hide = [\"00:09.*\"]").is_empty());
}

#[test]
fn the_command_line_of_the_kernels_backend_is_understood_at_boot() {
    for (parameter, reserved) in [
        ("xen-pciback.hide=(0000:00:05.0)", &["0000:00:05.0"][..]),
        ("xen_pciback.hide=(0:5.0)", &["0000:00:05.0"]),
        (
            "xen-pciback.hide=(00:06.*)(0A:0.0)",
            &["0000:00:06.0", "0000:00:06.1", "0000:0a:00.0"],
        ),
        ("xen-pciback.hide=(0000:0c:*.*)", &["0000:0c:00.0"]),
        // behind a bridge, as the kernel has it
        ("xen-pciback.hide=(00:09.0)", &["0000:0a:00.0"]),
        (
            "xen-pciback.hide=\" ( 00:05.0 ) (00:06.1)\"",
            &["0000:00:05.0", "0000:00:06.1"],
        ),
        (
            "\"xen-pciback.hide=(00:05.0) (00:06.1)\"",
            &["0000:00:05.0", "0000:00:06.1"],
        ),
        ("-- xen-pciback.hide=(00:05.0)", &[]),
        ("pciback.hide=(00:05.0)", &[]),
        ("xen-pciback.hide=", &[]),
    ] {
        let machine = Machine::new();
        let (found, said) = machine.reserve("", &format!("quiet {parameter} ro"));
        assert_eq!(found, reserved, "{parameter}");
        assert!(!said.contains("<3>"), "{parameter}: {said}");
    }
}

#[test]
fn a_typo_in_the_kernels_command_line_is_told_of_and_the_others_are_reserved() {
    for typo in [
        "(00:06)",
        "(00:06.8)",
        "(*:06.0)",
        "(00:*.0)",
        "(00:20.0)",
        "(1:00:06.0.0)",
        "()",
        "(00:06,0)",
        "(g:06.0)",
        "(0:0:0:6.0)",
        "(12345:00:06.0)",
        "(00:06.)",
        "(100:06.0)",
    ] {
        let machine = Machine::new();
        let (found, said) =
            machine.reserve("", &format!("xen-pciback.hide=(00:05.0){typo}(0a:00.0)"));
        assert_eq!(found, ["0000:00:05.0", "0000:0a:00.0"], "{typo}");
        assert!(
            said.contains(&format!(
                "<3>pciback: xen-pciback.hide: {typo} names no device"
            )),
            "{typo}: {said}"
        );
    }
    let (found, said) = Machine::new().reserve("", "xen-pciback.hide=(00:05.0)00:06.0(0a:00.0)");
    assert_eq!(found, ["0000:00:05.0"]);
    assert!(
        said.contains("a parenthesis is missing at '00:06.0(0a:00.0)'"),
        "{said}"
    );
}

#[test]
fn a_device_that_is_not_there_is_told_of_on_the_console() {
    let (found, said) = Machine::new().reserve(
        "*/0000:42:00.0\n* 0x1234 0x5678\n",
        "xen-pciback.hide=(41:00.0)",
    );
    assert!(found.is_empty());
    for missing in ["*/0000:42:00.0 of", "* 0x1234 0x5678 of", "(41:00.0)"] {
        assert!(said.contains(missing), "{said}");
    }
}

#[test]
fn a_device_whose_driver_is_built_into_the_kernel_is_told_of() {
    let machine = Machine::new();
    fs::write(
        machine.path("sys/devices/pci0000:00/0000:00:05.0/driver"),
        "",
    )
    .unwrap();
    let (_, said) = machine.reserve("*/0000:00:05.0\n", "");
    assert!(said.contains("0000:00:05.0 already has a driver"), "{said}");
}

#[test]
fn nothing_is_reserved_when_the_command_line_says_so() {
    let (found, _) = Machine::new().reserve(
        "*/0000:00:05.0\n",
        "xen-pciback.hide=(00:06.0) pciback.reserve=0",
    );
    assert!(found.is_empty());
}

/// What systemd says of the units, with our programs where they will be; `None` without systemd.
fn verified() -> Option<String> {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(UNITS).unwrap() {
        let path = entry.unwrap().path();
        let unit = fs::read_to_string(&path)
            .unwrap()
            .replace("/usr/sbin/pciback", env!("CARGO_BIN_EXE_pciback"))
            // The daemon stands beside the command line, and here one program is as good as the other.
            .replace(
                concat!(env!("CARGO_BIN_EXE_pciback"), "d "),
                concat!(env!("CARGO_BIN_EXE_pciback"), " "),
            );
        fs::write(directory.path().join(path.file_name().unwrap()), unit).unwrap();
    }
    let units: Vec<PathBuf> = fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(&units)
        .output()
        .ok()?;
    Some(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn systemd_understands_the_units() {
    let Some(said) = verified() else {
        println!("there is no systemd-analyze here");
        return;
    };
    let about_ours: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("pcibackd"))
        .collect();
    assert!(about_ours.is_empty(), "{about_ours:?}");
}
