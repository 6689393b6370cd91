//! What the program shows of guests at work, on an embedded Xen.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pcibackd::config::Config;
use pcibackd::control::protocol::{DaemonStatus, Response};
use pcibackd::control::traced::Traced;
use pcibackd::daemon::Embedded;
use pcibackd::host::devices::for_xen;
use pcibackd::host::sim::NVME;
use tempfile::TempDir;
use xenbus::PciDevice;
use xenbus::sim::{DomainKind, Frontend, MachineOptions, PciOptions, Variant};

const LONG: Duration = Duration::from_secs(10);
const FIRST: PciDevice = PciDevice {
    segment: 0,
    bus: 0,
    devfn: 0,
};

/// A guest named "web" that has the NVMe drive.
struct Stage {
    frontend: Frontend,
    _embedded: Embedded,
    run_dir: TempDir,
}

impl Stage {
    fn new() -> Self {
        let run_dir = tempfile::tempdir().unwrap();
        let path = run_dir.path().to_owned();
        let embedded = Embedded::start(path, Config::default(), MachineOptions::default()).unwrap();
        assert!(
            pciback(run_dir.path(), &["hide", &NVME.to_string()])
                .status
                .success()
        );
        let machine = embedded.machine();
        let domain = machine.create_domain("web", DomainKind::Pv).unwrap();
        machine
            .pci_attach(domain, for_xen(NVME), &PciOptions::default())
            .unwrap();
        machine.unpause_domain(domain).unwrap();
        let mut frontend = Frontend::new(machine.guest(domain), Variant::Linux).unwrap();
        frontend.connect(LONG).unwrap();
        Self {
            frontend,
            _embedded: embedded,
            run_dir,
        }
    }

    fn path(&self) -> &Path {
        self.run_dir.path()
    }

    fn status(&self) -> DaemonStatus {
        let output = pciback(self.path(), &["status", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Starts a trace, and returns when it is on.
    fn trace(&self, arguments: &[&str]) -> Child {
        let child = command(self.path(), &["trace"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        self.until_traced(true);
        child
    }

    fn until_traced(&self, traced: bool) {
        let start = Instant::now();
        while self.status().guests[0].traced != traced {
            assert!(start.elapsed() < LONG);
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn work(&mut self) {
        self.frontend.conf_read(FIRST, 0, 4).unwrap();
        self.frontend.conf_write(FIRST, 4, 2, 0x0006).unwrap();
        self.frontend.conf_write(FIRST, 0x0e, 1, 1).unwrap();
    }
}

fn pciback(run_dir: &Path, arguments: &[&str]) -> Output {
    command(run_dir, arguments).output().unwrap()
}

fn command(run_dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pciback"));
    command.arg("--run-dir").arg(run_dir).args(arguments);
    command
}

fn interrupt(child: Child) -> (i32, String, String) {
    // What it was told shall have come out.
    thread::sleep(Duration::from_millis(100));
    kill(
        Pid::from_raw(child.id().try_into().unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn a_trace_goes_to_a_file_as_a_json_object_per_line_until_ctrl_c() {
    let mut stage = Stage::new();
    let file = stage.path().join("trace.json");
    let child = stage.trace(&["web", "--output", file.to_str().unwrap()]);
    stage.work();
    let (code, out, err) = interrupt(child);
    assert_eq!((code, out.as_str()), (0, ""));
    assert!(err.contains("3 operations; none was missed"), "{err}");
    let lines = std::fs::read_to_string(&file).unwrap();
    let traced: Vec<Traced> = lines
        .lines()
        .map(|line| match serde_json::from_str(line).unwrap() {
            Response::Operation(traced) => *traced,
            other => panic!("{other:?}"),
        })
        .collect();
    let told: Vec<_> = traced
        .iter()
        .map(|traced| {
            (
                traced.command.as_str(),
                traced.registers[0].name.as_str(),
                traced.outcome.as_str(),
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            ("conf_read", "Vendor ID", "done"),
            ("conf_write", "Command", "done"),
            ("conf_write", "Header Type", "dropped")
        ]
    );
    stage.until_traced(false);
}

#[test]
fn a_trace_on_the_screen_names_registers_and_fields() {
    let mut stage = Stage::new();
    let child = stage.trace(&["0000:02:00.0", "--writes"]);
    stage.work();
    let (code, out, _) = interrupt(child);
    assert_eq!(code, 0);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 2, "{out}");
    assert!(lines[0].contains("web"), "{out}");
    assert!(
        lines[0].contains("Command: Memory Space Enable, Bus Master Enable"),
        "{out}"
    );
    assert!(lines[1].contains(" dropped "), "{out}");
    assert!(!out.contains('\x1b'));
}

#[test]
fn a_trace_ends_when_nobody_reads_it_any_more() {
    let mut stage = Stage::new();
    let mut child = stage.trace(&["--json"]);
    drop(child.stdout.take());
    stage.work();
    stage.until_traced(false);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_trace_cannot_outlive_the_daemon() {
    let stage = Stage::new();
    let child = stage.trace(&[]);
    drop(stage);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("hung up"));
}

#[test]
fn the_metrics_are_printed_as_a_scraper_gets_them() {
    let mut stage = Stage::new();
    stage.work();
    let output = pciback(stage.path(), &["metrics"]);
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(page.starts_with("# HELP pciback_build_info "), "{page}");
    assert!(
        page.contains("pciback_dropped_writes_total{domain=\"1\",name=\"web\"} "),
        "{page}"
    );
    let nowhere = tempfile::tempdir().unwrap();
    let output = pciback(nowhere.path(), &["metrics"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("metrics.sock"));
}
