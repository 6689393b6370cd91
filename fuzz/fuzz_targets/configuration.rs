//! Any configuration space, and any accesses to it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    assert_eq!(conf_space::fuzz::play(data), Ok(()));
});
