//! What the documents say of tests is true: every test and every scenario that they name is there.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).expect(path)
}

/// All Rust files of the workspace.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !name.starts_with('.') && name != "target" {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// The names of all functions of the workspace.
fn functions() -> BTreeSet<String> {
    let mut files = Vec::new();
    sources(root(), &mut files);
    let mut names = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(file).unwrap();
        names.extend(text.lines().filter_map(|line| {
            let (_, rest) = line.split_once("fn ")?;
            let name = rest
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .next()?;
            Some(name.to_owned())
        }));
    }
    names
}

/// What stands in backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Test names are sentences.
fn is_test_name(word: &str) -> bool {
    word.matches('_').count() >= 3
        && word
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// The tests that a text names, and the scenarios: ``lab `NAME` ``.
fn named(text: &str) -> (Vec<&str>, Vec<&str>) {
    let tests = quoted(text).filter(|word| is_test_name(word)).collect();
    let scenarios = text
        .split("lab `")
        .skip(1)
        .filter_map(|rest| rest.split('`').next())
        .collect();
    (tests, scenarios)
}

fn check(document: &str) {
    let (text, functions) = (read(document), functions());
    let (tests, scenarios) = named(&text);
    assert!(!tests.is_empty() && !scenarios.is_empty());
    let mut missing: Vec<String> = tests
        .into_iter()
        .filter(|test| !functions.contains(*test))
        .map(str::to_owned)
        .collect();
    missing.extend(
        scenarios
            .into_iter()
            .map(|name| format!("tests/lab/scenarios/{name}.sh"))
            .filter(|path| !root().join(path).exists()),
    );
    assert!(
        missing.is_empty(),
        "{document} names what is not there: {missing:#?}"
    );
}

#[test]
fn what_the_security_document_names_is_there() {
    check("docs/security.md");
}

#[test]
fn every_test_of_an_advisory_is_in_the_security_document() {
    let document = read("docs/security.md");
    let missing: Vec<String> = functions()
        .into_iter()
        .filter(|name| name.starts_with("xsa_") || name.starts_with("cve_"))
        .filter(|name| !document.contains(&format!("`{name}`")))
        .collect();
    assert!(missing.is_empty(), "{missing:#?}");
}
