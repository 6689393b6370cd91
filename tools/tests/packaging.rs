//! The files that packages install.

use std::fs;
use std::path::Path;

use conf_space::topology::TopologyKind;
use pcibackd::config::Config;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/pcibackd.toml");

#[test]
fn the_example_configuration_changes_nothing() {
    let config = Config::load(Some(Path::new(EXAMPLE))).unwrap();
    assert_eq!(config, Config::default());
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
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, uncommented).unwrap();
    let config = Config::load(Some(file.path())).unwrap();
    assert_eq!(config.facade, Config::default().facade);
    assert_eq!(config.topology, Config::default().topology);
    assert_eq!(config.topology_of("database"), TopologyKind::Passthrough);
    assert!(!config.hide.is_empty());
}
