//! What the documents say of tests is true: every test and every scenario that they name is there.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The numbered behaviours of Linux's backend and of its users' wishes, and how many there are of each kind.
const ANCHORS: [(char, usize); 6] = [
    ('W', 10),
    ('X', 6),
    ('V', 7),
    ('C', 10),
    ('O', 3),
    ('L', 18),
];

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

/// The names of all tests of the workspace: of functions below the attribute.
fn all_tests() -> BTreeSet<String> {
    let mut files = Vec::new();
    sources(root(), &mut files);
    let mut names = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(file).unwrap();
        names.extend(text.split("#[test]").skip(1).filter_map(|rest| {
            let (_, rest) = rest.split_once("fn ")?;
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

/// Files and directories of the tree.
fn is_path(word: &str) -> bool {
    let tops = [
        "conf_space/",
        "fuzz/",
        "msi/",
        "src/",
        "tests/",
        "tools/",
        "xenbus/",
    ];
    tops.iter().any(|top| word.starts_with(top))
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
    let (text, known) = (read(document), all_tests());
    let (tests, scenarios) = named(&text);
    assert!(!tests.is_empty() && !scenarios.is_empty());
    let mut missing: Vec<String> = tests
        .into_iter()
        .filter(|test| !known.contains(*test))
        .map(str::to_owned)
        .collect();
    missing.extend(
        scenarios
            .into_iter()
            .map(|name| format!("tests/lab/scenarios/{name}.sh"))
            .filter(|path| !root().join(path).exists()),
    );
    missing.extend(
        quoted(&text)
            .filter(|word| is_path(word) && !root().join(word).exists())
            .map(str::to_owned),
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
fn what_the_compatibility_document_names_is_there() {
    check("docs/compatibility.md");
}

#[test]
fn every_test_of_an_advisory_is_in_the_security_document() {
    let document = read("docs/security.md");
    let missing: Vec<String> = all_tests()
        .into_iter()
        .filter(|name| name.starts_with("xsa_") || name.starts_with("cve_"))
        .filter(|name| !document.contains(&format!("`{name}`")))
        .collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn every_behaviour_has_one_line_with_its_test_or_the_reason_why_not() {
    let document = read("docs/compatibility.md");
    for (kind, count) in ANCHORS {
        for number in 1..=count {
            let start = format!("| {kind}-{number} |");
            let lines: Vec<&str> = document
                .lines()
                .filter(|line| line.starts_with(&start))
                .collect();
            assert_eq!(lines.len(), 1, "{kind}-{number}");
            let cells: Vec<&str> = lines[0].split(" | ").collect();
            assert_eq!(cells.len(), 4, "{}", lines[0]);
            let (tests, scenarios) = named(cells[3]);
            let is_there = !tests.is_empty() || !scenarios.is_empty();
            let is_not = cells[2].starts_with("not:");
            assert!(
                is_there || is_not,
                "{}: neither a test nor a reason",
                lines[0]
            );
        }
    }
}
