//! `pcibackd --check-config`, which looks at a file and starts nothing.
#![allow(clippy::unwrap_used)]

use std::process::Command;

/// Exit code, and all that is said.
fn check(text: &str) -> (Option<i32>, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pcibackd.toml");
    std::fs::write(&path, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pcibackd"));
    let output = command.arg("--check-config").arg(&path).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn a_file_that_can_be_used_is_code_0() {
    let (code, said) = check("[defaults]\nreset = \"flr\"\n");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("can be used"), "{said}");
}

#[test]
fn a_typo_is_code_1_with_its_line() {
    let (code, said) = check("topology = \"vpci\"\n[defaults]\nrset = \"flr\"\n");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("line 3") && said.contains("rset"), "{said}");
}

#[test]
fn an_entry_of_hide_that_names_nothing_is_code_1_and_the_others_are_looked_at() {
    let (code, said) = check("hide = [\"03:00\"]\n[[device]]\nid = \"ffff:0001\"\n");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("error: hide: \"03:00\""), "{said}");
    assert!(said.contains("warning: "), "{said}");
}

#[test]
fn a_file_that_is_not_there_is_code_1() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pcibackd"));
    let output = command
        .args(["--check-config", "/nonexistent.toml"])
        .output();
    assert_eq!(output.unwrap().status.code(), Some(1));
}
