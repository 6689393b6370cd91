//! Any accesses of an HVM guest's driver to the registers of a virtio device.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| virtio::transport::fuzzing::accesses(data));
