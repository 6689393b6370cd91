//! What the program does on a terminal, and nowhere else.
#![allow(clippy::unwrap_used, clippy::arithmetic_side_effects)]

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::pty::openpty;
use pcibackd::config::Config;
use pcibackd::daemon::Embedded;
use pcibackd::host::sim::NVME;
use tempfile::TempDir;
use xenbus::sim::MachineOptions;

fn daemon() -> (TempDir, Embedded) {
    let run_dir = tempfile::tempdir().unwrap();
    let path = run_dir.path().to_owned();
    let embedded = Embedded::start(path, Config::default(), MachineOptions::default()).unwrap();
    (run_dir, embedded)
}

/// Runs it with standard output and error on a terminal, and returns what that showed.
fn on_a_terminal(run_dir: &Path, arguments: &[&str], no_color: Option<&str>) -> String {
    let pty = openpty(None, None).unwrap();
    let terminal = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_pciback"));
    command.arg("--run-dir").arg(run_dir).args(arguments);
    command.env("TERM", "xterm").env_remove("NO_COLOR");
    if let Some(value) = no_color {
        command.env("NO_COLOR", value);
    }
    command.stdout(terminal()).stderr(terminal());
    let mut child = command.spawn().unwrap();
    drop((command, pty.slave));
    let mut master = File::from(pty.master);
    let reader = thread::spawn(move || {
        let (mut shown, mut buffer) = (Vec::new(), [0; 4096]);
        // When the last of its users has closed it, a terminal gives an error.
        while let Ok(count @ 1..) = master.read(&mut buffer) {
            shown.extend(buffer.iter().take(count));
        }
        shown
    });
    assert!(child.wait().unwrap().success());
    String::from_utf8(reader.join().unwrap()).unwrap()
}

#[test]
fn there_are_colours_unless_they_are_not_wanted() {
    let (run_dir, _daemon) = daemon();
    for arguments in [&["list"][..], &["show", "02:00.0"]] {
        let colours =
            |no_color| on_a_terminal(run_dir.path(), arguments, no_color).contains("\x1b[");
        assert!(colours(None), "{arguments:?}");
        assert!(!colours(Some("1")), "{arguments:?}");
        // no-color.org: not when it is empty.
        assert!(colours(Some("")), "{arguments:?}");
    }
}

#[test]
fn who_waits_for_a_reset_sees_for_how_long_and_nothing_of_it_stays() {
    let (run_dir, daemon) = daemon();
    daemon
        .bus()
        .set_reset_time(NVME, Duration::from_millis(2500));
    let device = NVME.to_string();
    let shown = on_a_terminal(run_dir.path(), &["hide", &device], None);
    assert!(shown.contains("0000:02:00.0: resetting (1 s)"), "{shown:?}");
    let last = shown.rsplit("\x1b[K").next().unwrap();
    assert_eq!(last, "0000:02:00.0: hidden\r\n", "{shown:?}");
}
