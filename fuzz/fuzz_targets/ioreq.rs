//! Any requests of an HVM guest's CPUs.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| virtio::ioreq::fuzzing::requests(data));
