//! Any bytes from xenstored.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| xenbus::fuzzing::wire_decoder(data));
