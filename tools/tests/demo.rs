//! The demonstration, as a person starts it.

use std::process::{Command, Stdio};

fn demo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pciback"));
    command.arg("demo");
    command
}

#[test]
fn all_that_the_demonstration_tells_is_so() {
    let output = demo().output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{out}");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    for part in [
        "frontend: Connected (4)",
        "backend: Reconfigured (8)",
        "100 interrupts by vector 3",
        "0 pages and 0 PIRQs are mapped",
        "All of it holds",
    ] {
        assert!(out.contains(part), "{part:?} is not in:\n{out}");
    }
    for part in ["FAILED", "warn:", "error:"] {
        assert!(!out.contains(part), "{part:?} is in:\n{out}");
    }
}

#[test]
fn it_comes_to_its_end_without_a_reader_and_leaves_no_files() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = demo()
        .env("TMPDIR", directory.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn without_a_directory_for_its_sockets_it_says_so() {
    let output = demo().env("TMPDIR", "/nonexistent").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(err.contains("TMPDIR"), "{err}");
}
