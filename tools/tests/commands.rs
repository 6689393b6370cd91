//! The program against a running daemon, on an embedded Xen with simulated devices.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use conf_space::Bdf;
use pcibackd::config::Config;
use pcibackd::control::policy::{DroppedShown, SettingsShown};
use pcibackd::control::protocol::{DaemonStatus, DeviceLine, PhysicalFunction, Shown};
use pcibackd::daemon::Embedded;
use pcibackd::doctor::{Finding, Verdict};
use pcibackd::host::sim::{BOOT_CONTROLLER, BRIDGE, NIC, NIC_VF0, NVME};
use tempfile::TempDir;
use xenbus::sim::MachineOptions;

struct Daemon {
    _embedded: Embedded,
    run_dir: TempDir,
}

impl Daemon {
    fn start() -> Self {
        let run_dir = tempfile::tempdir().unwrap();
        let path = run_dir.path().to_owned();
        let embedded = Embedded::start(path, Config::default(), MachineOptions::default()).unwrap();
        Self {
            _embedded: embedded,
            run_dir,
        }
    }

    fn pciback(&self, arguments: &[&str]) -> (i32, String, String) {
        pciback(self.run_dir.path(), arguments)
    }

    fn devices(&self) -> Vec<DeviceLine> {
        let (code, out, _) = self.pciback(&["list", "--json"]);
        assert_eq!(code, 0);
        serde_json::from_str(&out).unwrap()
    }

    fn state(&self, bdf: Bdf) -> String {
        let mut devices = self.devices().into_iter();
        devices.find(|line| line.device == bdf).unwrap().state
    }
}

/// Exit code, standard output, standard error.
fn pciback(run_dir: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = command(run_dir, arguments).output().unwrap();
    told(output)
}

fn command(run_dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pciback"));
    command.arg("--run-dir").arg(run_dir).args(arguments);
    command
}

fn told(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn a_bad_entry_is_reported_and_voids_no_other() {
    let daemon = Daemon::start();
    let (code, out, err) = daemon.pciback(&["hide", "(02:00.0)(nonsense)", "01:10.*,0a:00.0"]);
    assert_eq!(code, 1);
    let done: Vec<&str> = out.lines().collect();
    assert_eq!(
        done,
        [
            "0000:02:00.0: hidden",
            "0000:01:10.0: hidden",
            "0000:01:10.2: hidden"
        ]
    );
    let refused: Vec<&str> = err.lines().collect();
    assert_eq!(refused.len(), 2, "{err}");
    assert!(refused[0].contains("nonsense") && refused[1].contains("0000:0a:00.0"));
    assert_eq!(daemon.state(NVME), "hidden");
    assert_eq!(daemon.state(NIC), "dom0");
}

#[test]
fn all_done_is_code_0_and_the_way_back_is_as_the_way_there() {
    let daemon = Daemon::start();
    let before = daemon.devices();
    for _ in 0..2 {
        let (code, _, err) = daemon.pciback(&["hide", "01:10.0", "02:00.0"]);
        assert_eq!((code, err.as_str()), (0, ""));
    }
    let (code, out, err) = daemon.pciback(&["unhide", "01:10.0", "02:00.0"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("given back to dom0's nvme"), "{out}");
    assert_eq!(daemon.devices(), before);
}

#[test]
fn what_dom0_lives_on_takes_force_and_a_bridge_is_never_hidden() {
    let daemon = Daemon::start();
    let disk = BOOT_CONTROLLER.to_string();
    let (code, out, err) = daemon.pciback(&["hide", &disk]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.contains("root file system") && err.contains("--force"),
        "{err}"
    );
    assert_eq!(daemon.pciback(&["hide", "--force", &disk]).0, 0);
    assert_eq!(daemon.state(BOOT_CONTROLLER), "hidden");
    assert_eq!(
        daemon.pciback(&["hide", "--force", &BRIDGE.to_string()]).0,
        1
    );
}

#[test]
fn without_anything_that_can_be_understood_nothing_is_asked() {
    let nowhere = tempfile::tempdir().unwrap();
    for lists in [&["hide", "nonsense"][..], &["unhide", ""], &["hide"]] {
        let (code, out, err) = pciback(nowhere.path(), lists);
        assert_eq!((code, out.as_str()), (2, ""), "{lists:?}");
        assert!(!err.contains("control.sock"), "{err}");
    }
}

#[test]
fn without_a_daemon_it_says_where_it_looked_and_what_to_do() {
    let nowhere = tempfile::tempdir().unwrap();
    for arguments in [
        &["list"][..],
        &["status"],
        &["show", "2:0.0"],
        &["hide", "2:0.0"],
    ] {
        let (code, out, err) = pciback(nowhere.path(), arguments);
        assert_eq!((code, out.as_str()), (1, ""), "{arguments:?}");
        assert!(
            err.contains("control.sock") && err.contains("systemctl start pcibackd"),
            "{err}"
        );
    }
}

#[test]
fn what_is_set_for_a_device_is_shown_with_where_it_comes_from() {
    let daemon = Daemon::start();
    let nvme = NVME.to_string();
    let (code, _, err) = daemon.pciback(&["set", &nvme, "permissive=true"]);
    assert_eq!(code, 1);
    assert!(err.contains("pciback hide"), "{err}");
    assert_eq!(daemon.pciback(&["hide", &nvme]).0, 0);
    let (code, out, _) = daemon.pciback(&["set", &nvme, "permissive+=0xe8..0xea", "reset=none"]);
    assert_eq!(code, 0);
    for part in ["[\"0xe8..0xea\"]", "set at run time", "next guest"] {
        assert!(out.contains(part), "{out}");
    }
    let (code, out, _) = daemon.pciback(&["set", &nvme, "--json"]);
    assert_eq!(code, 0);
    let shown: SettingsShown = serde_json::from_str(&out).unwrap();
    let names: Vec<&str> = shown
        .settings
        .iter()
        .map(|line| line.name.as_str())
        .collect();
    for name in ["permissive", "reset", "allow_shared_pages", "intx", "host"] {
        assert!(names.contains(&name), "{names:?}");
    }
    let (code, _, err) = daemon.pciback(&["set", &nvme, "permissive=0x48..0x40"]);
    assert_eq!(code, 1);
    assert!(err.contains("0x1000"), "{err}");
    let (code, out, _) = daemon.pciback(&["show", &nvme, "--dropped"]);
    assert_eq!(code, 0);
    assert!(
        out.contains("no write of the guest's was dropped (no guest yet)"),
        "{out}"
    );
    let (code, out, _) = daemon.pciback(&["show", &nvme, "--dropped", "--json"]);
    assert_eq!(code, 0);
    let dropped: DroppedShown = serde_json::from_str(&out).unwrap();
    assert_eq!(dropped.suggestion, None);
}

#[test]
fn the_list_has_each_device_once() {
    let daemon = Daemon::start();
    let (code, out, _) = daemon.pciback(&["list"]);
    assert_eq!(code, 0);
    let devices = daemon.devices();
    assert_eq!(out.lines().count(), devices.len() + 1);
    for (line, device) in out.lines().skip(1).zip(&devices) {
        assert!(
            line.starts_with(&format!("{}  dom0 ", device.device)),
            "{line}"
        );
    }
}

#[test]
fn a_virtual_functions_identity_is_shown_as_emulated_and_its_hardwares_as_it_is() {
    let daemon = Daemon::start();
    let vf = NIC_VF0.to_string();
    let (code, out, _) = daemon.pciback(&["show", "--json", &vf]);
    assert_eq!(code, 0);
    let shown: Shown = serde_json::from_str(&out).unwrap();
    let vendor = &shown.fields[0];
    assert_eq!(
        (vendor.offset, vendor.value, vendor.hardware),
        (0, Some(0x8086), Some(0xffff))
    );
    let (_, text, _) = daemon.pciback(&["show", &vf]);
    let line = text
        .lines()
        .find(|line| line.contains("Vendor ID"))
        .unwrap();
    let words: Vec<&str> = line.split_whitespace().rev().take(3).collect();
    assert_eq!(words, ["emulated", "ffff", "8086"]);
    for capability in ["MSI-X", "PCI Express"] {
        assert!(text.lines().any(|line| line == capability), "{text}");
    }
}

#[test]
fn a_device_that_is_not_there_cannot_be_shown() {
    let daemon = Daemon::start();
    let (code, out, err) = daemon.pciback(&["show", "0a:00.0"]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("0000:0a:00.0"), "{err}");
}

#[test]
fn the_status_tells_version_platform_and_facade() {
    let daemon = Daemon::start();
    let (code, out, _) = daemon.pciback(&["status", "--json"]);
    assert_eq!(code, 0);
    let status: DaemonStatus = serde_json::from_str(&out).unwrap();
    assert_eq!(status.platform, "sim");
    let (_, text, _) = daemon.pciback(&["status"]);
    let first = format!(
        "pcibackd {}, platform sim, facade {}, up ",
        status.version, status.facade
    );
    assert!(text.starts_with(&first), "{text}");
}

#[test]
fn the_doctor_finds_nothing_wrong_with_a_healthy_device_and_tries_its_resets_when_told_to() {
    let daemon = Daemon::start();
    assert_eq!(daemon.pciback(&["hide", "02:00.0"]).0, 0);
    let (code, out, err) = daemon.pciback(&["doctor"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("0000:02:00.0\n"), "{out}");
    assert!(out.ends_with("no problems, no warnings\n"), "{out}");
    let (code, out, _) = daemon.pciback(&["doctor", "--try-resets", "--json", "02:00.0"]);
    assert_eq!(code, 0);
    let findings: Vec<Finding> = serde_json::from_str(&out).unwrap();
    let tried = findings
        .iter()
        .find(|finding| finding.check == "reset by flr");
    assert_eq!(tried.unwrap().verdict, Verdict::Ok);
}

#[test]
fn the_doctor_works_without_a_daemon_and_says_that_there_is_none() {
    let nowhere = tempfile::tempdir().unwrap();
    let (code, out, _) = pciback(nowhere.path(), &["doctor", "--json"]);
    assert_eq!(code, 1);
    let findings: Vec<Finding> = serde_json::from_str(&out).unwrap();
    let daemon = findings.iter().find(|finding| finding.check == "daemon");
    let daemon = daemon.unwrap();
    assert_eq!(daemon.verdict, Verdict::Problem);
    assert!(daemon.remedy.as_ref().unwrap().contains("systemctl start"));
    let (code, out, err) = pciback(nowhere.path(), &["doctor", "--try-resets", "02:00.0"]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("systemctl start"), "{err}");
}

#[test]
fn a_device_is_reset_by_hand_when_no_guest_has_it() {
    let daemon = Daemon::start();
    assert_eq!(daemon.pciback(&["hide", "02:00.0"]).0, 0);
    let (code, out, _) = daemon.pciback(&["reset", "02:00.0"]);
    assert_eq!(code, 0);
    assert!(out.contains("can be given to a guest"), "{out}");
    let (code, _, err) = daemon.pciback(&["reset", "--method", "bus", "02:00.0", "01:00.0"]);
    assert_eq!(code, 1);
    assert!(err.contains("the kernel offers flr"), "{err}");
    assert!(err.contains("0000:01:00.0 is not hidden"), "{err}");
}

#[test]
fn a_command_is_not_run_without_the_facade() {
    let nowhere = tempfile::tempdir().unwrap();
    let (code, out, err) = pciback(nowhere.path(), &["exec", "--", "echo", "run"]);
    assert_eq!((code, out.as_str()), (125, ""));
    assert!(!err.is_empty());
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let daemon = Daemon::start();
    let mut child = command(daemon.run_dir.path(), &["show", &NVME.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let (code, _, err) = told(child.wait_with_output().unwrap());
    assert_eq!((code, err.as_str()), (0, ""));
}

#[test]
fn nothing_but_a_terminal_gets_colours() {
    let daemon = Daemon::start();
    for arguments in [&["list"][..], &["status"], &["show", "2:0.0"]] {
        let (_, out, _) = daemon.pciback(arguments);
        assert!(!out.contains('\x1b'));
    }
}

#[test]
fn manual_pages_have_their_examples_in_a_section_of_their_own() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    assert_eq!(pciback(path, &["man", path.to_str().unwrap()]).0, 0);
    let page = |name: &str| std::fs::read_to_string(path.join(name)).unwrap();
    let hide = page("pciback-hide.1");
    let (before, examples) = hide.split_once(".SH EXAMPLES\n.nf\n").unwrap();
    assert!(
        examples.starts_with("\\&pciback hide 03:00.0\n"),
        "{examples}"
    );
    assert!(
        before.contains("\\-\\-force") && !before.contains("Examples:"),
        "{before}"
    );
    // Commands below a command have pages, too.
    assert!(page("pciback-vf-create.1").contains("pciback\\-vf\\-create"));
    let daemon = page("pcibackd.8");
    assert!(
        daemon.contains(".TH pcibackd 8") && daemon.contains("\\-\\-check\\-config"),
        "{daemon}"
    );
}

#[test]
fn completions_and_manual_pages_know_all_commands() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    assert_eq!(pciback(directory.path(), &["man", path]).0, 0);
    for name in [
        "hide", "unhide", "reset", "list", "show", "status", "doctor", "exec", "demo",
    ] {
        assert!(directory.path().join(format!("pciback-{name}.1")).exists());
        for shell in ["bash", "zsh", "fish"] {
            let (code, script, _) = pciback(directory.path(), &["completions", shell]);
            assert_eq!(code, 0);
            assert!(script.contains(name), "{shell} {name}");
        }
    }
}

#[test]
fn virtual_functions_are_listed_made_and_taken_away() {
    let daemon = Daemon::start();
    let (code, out, _) = daemon.pciback(&["vf", "list"]);
    assert_eq!(code, 0);
    let lines: Vec<&str> = out.lines().collect();
    assert!(
        lines[1].starts_with("0000:01:00.0    2 of 8  dom0"),
        "{out}"
    );
    assert!(
        lines[3].starts_with("  0000:01:10.2  1       dom0   igbvf"),
        "{out}"
    );
    let (code, _, err) = daemon.pciback(&["vf", "create", "4", "01:00.0"]);
    assert_eq!(code, 1);
    assert!(err.contains("pciback vf destroy 0000:01:00.0"), "{err}");
    let (code, out, _) = daemon.pciback(&["vf", "destroy", "01:00.0"]);
    assert_eq!(code, 0);
    assert_eq!(
        out,
        "0000:01:00.0: its 2 virtual functions are taken away\n"
    );
    let (code, out, _) = daemon.pciback(&["vf", "create", "1", "--hide", "01:00.0"]);
    assert_eq!(code, 0);
    assert_eq!(out, "0000:01:10.0: there, and hidden\n");
    assert_eq!(daemon.state(NIC_VF0), "hidden");
    let (code, out, _) = daemon.pciback(&["vf", "list", "--json", "01:00.0"]);
    assert_eq!(code, 0);
    let listed: Vec<PhysicalFunction> = serde_json::from_str(&out).unwrap();
    assert_eq!((listed[0].device.device, listed[0].total), (NIC, 8));
    assert_eq!(listed[0].virtual_functions[0].device.device, NIC_VF0);
    let (code, _, err) = daemon.pciback(&["vf", "list", "02:00.0"]);
    assert_eq!(code, 1);
    assert!(err.contains("no SR-IOV"), "{err}");
}
