//! Other users of dom0.

use std::fs;
use std::os::unix::fs::MetadataExt;

use pcibackd::host::sim::NVME;

use crate::guest::Guest;
use crate::house::House;

/// Fails when `Record::open` in host/record/mod.rs or `start` in control/server.rs leave the mode to the umask.
#[test]
fn what_the_daemon_keeps_is_for_root_alone() {
    let house = House::new(&[NVME]);
    let _guest = Guest::connected(&house, &[NVME]);
    let mut seen = 0;
    for directory in [house.run_dir().to_owned(), house.records_directory()] {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let mode = fs::metadata(&path).unwrap().mode();
            assert_eq!(mode & 0o077, 0, "{} {mode:o}", path.display());
            seen += 1;
        }
    }
    assert!(seen >= 4);
}
