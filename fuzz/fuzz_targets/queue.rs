//! Any bytes as rings and buffers of a virtqueue, and as requests of disks and commands of network cards.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    assert_eq!(virtio::fuzzing::play(data), Ok(()));
});
