//! A network card whose tap takes its time.

use std::fmt::Display;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio::Features;
use virtio::device::{Activation, Device, Events};
use virtio::memory::{GuestRam, Memfd};
use virtio::net::{Link, Net};

use crate::house::until;
use crate::storage::Storage;

#[derive(Default)]
struct Told(AtomicBool);

impl Events for Told {
    fn used(&self, _: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self, _: &dyn Display) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn nobody_waits_while_the_kernel_sets_a_tap_up() {
    let Some(storage) = Storage::mount() else {
        return;
    };
    // Stands for a tap whose ioctls wait until somebody else is done with network devices.
    let tap = File::options().read(true).write(true).open(storage.path());
    let mut net = Net::new(vec![Link::of_tap(tap.unwrap().into()).unwrap()], [0; 6]).unwrap();
    // Should this fail, it answers before the card waits for its threads.
    let storage = storage;
    let ram = Arc::new(GuestRam::new(Arc::new(Memfd::new(512).unwrap()), 1));
    let told = Arc::new(Told::default());
    let activate = |net: &mut Net| {
        storage.stall_ioctls();
        net.activate(Activation {
            ram: Arc::clone(&ram),
            queues: Vec::new(),
            features: Features::VERSION_1,
            events: Arc::clone(&told) as _,
        });
        until("the tap is being set up", || storage.waiting() == 1);
    };
    activate(&mut net);
    net.notify(0);
    net.reset();
    assert!(net.is_reset());
    storage.go_on();
    // The stand-in fails the second call, of which only the driver is told that there is then.
    activate(&mut net);
    assert!(!told.0.load(Ordering::SeqCst));
    storage.go_on();
    until("the driver is told", || told.0.load(Ordering::SeqCst));
}
