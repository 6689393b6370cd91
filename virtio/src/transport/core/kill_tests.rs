//! What becomes of a guest when the daemon is killed between any two stores to what is kept.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, missing_docs)]

use std::sync::{Arc, Mutex};

use conf_space::Width::{self, Four, One, Two};

use crate::device::{Activation, Device, DeviceKind};
use crate::features::Features;
use crate::ioreq::{Target, Window};
use crate::memory::{GuestRam, Words, kill};
use crate::pci::{Layout, Mode, Shape, VirtioFunction};
use crate::queue::{Chain, Queue};
use crate::rings::{BUFFERS, Driver, Guest, RINGS, readable};
use crate::transport::{InterruptSink, Notes, Parts, RING_FEATURES};

const SIZE: u16 = 8;
const COMMON: Window = Window::Region(4);
const STATUS: u64 = 0x14;
const QUEUE_RESET: u64 = 0x3a;

#[derive(Debug)]
struct Nowhere;

impl InterruptSink for Nowhere {
    fn msi(&self, _: u64, _: u32) {}
    fn intx(&self, _: bool) {}
}

/// Serves its queue on the thread that notifies it, and keeps what its driver sets.
struct Eager {
    ram: Arc<GuestRam>,
    queue: Mutex<Option<Queue>>,
    /// The first byte of each chain that was carried out.
    done: Arc<Mutex<Vec<u8>>>,
    kept: Option<Words>,
    /// Resets take until it is asked for so often whether they are done.
    patience: u8,
    busy: Mutex<u8>,
}

impl Eager {
    fn new(ram: &Arc<GuestRam>, done: &Arc<Mutex<Vec<u8>>>, patience: u8) -> Self {
        Self {
            patience,
            ram: Arc::clone(ram),
            queue: Mutex::default(),
            done: Arc::clone(done),
            kept: None,
            busy: Mutex::default(),
        }
    }

    fn serve(&self) {
        let mut chain = Chain::default();
        let view = self.ram.view();
        if let Some(queue) = &mut *self.queue.lock().unwrap() {
            while queue.pop(&view, &mut chain).unwrap() {
                let mut byte = [0];
                chain.reader().read_exact(&mut byte).unwrap();
                self.done.lock().unwrap().push(byte[0]);
                queue.complete(&view, chain.head(), 0).unwrap();
            }
        }
    }

    fn is_idle(&self) -> bool {
        let mut busy = self.busy.lock().unwrap();
        *busy = busy.saturating_sub(1);
        *busy == 0
    }
}

impl Device for Eager {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_sizes(&self) -> &[u16] {
        &[SIZE]
    }
    fn read_config(&self, _: usize, data: &mut [u8]) {
        data.fill(self.kept.as_ref().map_or(0, |kept| kept.get(0) as u8));
    }
    fn write_config(&mut self, _: usize, data: &[u8]) {
        self.kept.as_ref().unwrap().set(0, data[0].into());
    }
    fn kept_words(&self) -> usize {
        1
    }
    fn keep(&mut self, words: Words) {
        self.kept = Some(words);
    }
    fn activate(&mut self, activation: Activation) {
        for (_, queue) in activation.queues {
            *self.queue.lock().unwrap() = Some(queue);
        }
        self.serve();
    }
    fn notify(&self, _: u16) {
        self.serve();
    }
    fn reset(&mut self) {
        *self.queue.lock().unwrap() = None;
        *self.busy.lock().unwrap() = self.patience;
        self.kept.as_ref().unwrap().clear();
    }
    fn is_reset(&self) -> bool {
        self.is_idle()
    }
    fn reset_queue(&mut self, _: u16) {
        *self.queue.lock().unwrap() = None;
        *self.busy.lock().unwrap() = self.patience;
    }
    fn is_queue_reset(&self, _: u16) -> bool {
        self.is_idle()
    }
    fn enable_queue(&mut self, _: u16, queue: Queue) {
        *self.queue.lock().unwrap() = Some(queue);
        self.serve();
    }
}

/// A machine that dies at the n-th store, once, and is started again for the access that it died in.
struct Machine {
    guest: Guest,
    words: Words,
    done: Arc<Mutex<Vec<u8>>>,
    target: Option<VirtioFunction>,
    /// Stores until it dies.
    life: Option<usize>,
    patience: u8,
}

impl Machine {
    fn new(life: usize, patience: u8) -> Self {
        let guest = Guest::default();
        let done = Arc::default();
        let words = Notes::words(&Eager::new(&guest.ram, &done, patience));
        let mut machine = Self {
            guest,
            words: Words::volatile(words).unwrap(),
            done,
            target: None,
            life: Some(life),
            patience,
        };
        machine.access(|_| ());
        machine
    }

    fn start(&self) -> VirtioFunction {
        let device = Eager::new(&self.guest.ram, &self.done, self.patience);
        let parts = Parts {
            name: "test".into(),
            notes: Notes::new(self.words.clone(), &device).unwrap(),
            device: Box::new(device),
            features: RING_FEATURES,
            ram: Arc::clone(&self.guest.ram),
            sink: Arc::new(Nowhere),
        };
        let shape = Shape {
            mode: Mode::Transitional,
            layout: Layout::Compact,
            legacy_in_memory: false,
        };
        VirtioFunction::new(parts, &shape).unwrap()
    }

    fn access<T>(&mut self, access: impl Fn(&mut VirtioFunction) -> T) -> T {
        if let Some(life) = self.life.take() {
            let target = self.target.take();
            let run = || {
                let mut target = target.unwrap_or_else(|| self.start());
                let value = access(&mut target);
                (target, value)
            };
            if let Some(((target, value), left)) = kill::after(life, run) {
                (self.target, self.life) = (Some(target), Some(left));
                return value;
            }
        }
        let mut target = self.target.take().unwrap_or_else(|| self.start());
        let value = access(&mut target);
        self.target = Some(target);
        value
    }

    fn write(&mut self, window: Window, offset: u64, width: Width, value: u32) {
        self.access(|target| {
            target.write(window, offset, width, value);
            while target.holds(window, offset) {
                std::thread::yield_now();
            }
        });
    }

    fn read(&mut self, window: Window, offset: u64, width: Width) -> u32 {
        self.access(|target| target.read(window, offset, width))
    }

    fn set_up_queue(&mut self) {
        for (offset, width, value) in [
            (0x16, Two, 0),
            (0x20, Four, RINGS as u32),
            (0x28, Four, RINGS as u32 + 0x8000),
            (0x30, Four, RINGS as u32 + 0xa000),
            (0x1c, Two, 1),
        ] {
            self.write(COMMON, offset, width, value);
        }
    }

    fn set_up(&mut self) {
        for (offset, width, value) in [
            (STATUS, One, 3),
            (0x08, Four, 1),
            (0x0c, Four, 1 | 1 << 8),
            (STATUS, One, 0xb),
        ] {
            self.write(COMMON, offset, width, value);
        }
        self.set_up_queue();
        self.write(COMMON, STATUS, One, 0xf);
    }

    /// A driver whose ring was never used, with chains in it that begin with `name`.
    fn driver(&self, name: u8) -> Driver {
        let mut driver = Driver::again(&self.guest, 0, SIZE, Features::empty());
        self.guest.write(BUFFERS, &[name]);
        for _ in 0..3 {
            let chain = [readable(BUFFERS, 1)];
            driver.offer(&self.guest, &chain, None).unwrap();
        }
        driver
    }

    /// Has its chains carried out, and sees that each is given back once.
    fn finish(&mut self, mut driver: Driver) {
        self.write(COMMON, 0x6000, Two, 0);
        for _ in 0..3 {
            assert!(driver.used(&self.guest).is_some(), "a chain is lost");
        }
        assert!(driver.used(&self.guest).is_none());
        // What is carried out from now on was not asked for.
        self.guest.write(BUFFERS, &[0xff]);
    }

    fn poll(&mut self, offset: u64, width: Width) {
        for _ in 0..100 {
            if self.read(COMMON, offset, width) == 0 {
                return;
            }
        }
        panic!("the reset does not end");
    }
}

/// With the machine killed before each of the stores, one after the other.
fn at_any_store(play: impl Fn(&mut Machine)) {
    for patience in [1, 2] {
        for stores in 0.. {
            let mut machine = Machine::new(stores, patience);
            play(&mut machine);
            let done = machine.done.lock().unwrap();
            let times = |name| done.iter().filter(|done| **done == name).count();
            // One may have been carried out, but not given back, when it was killed.
            let right = times(1) >= 3 && times(2) >= 3 && done.len() <= 7 && times(0xff) == 0;
            assert!(right, "killed after {stores} stores: {done:?}");
            if machine.life.is_some() {
                assert!(stores > 100, "it was noted what the driver wrote");
                break;
            }
        }
    }
}

#[test]
fn a_kill_while_a_device_is_used_and_reset_neither_loses_nor_repeats_anything() {
    at_any_store(|machine| {
        let driver = machine.driver(1);
        machine.set_up();
        machine.finish(driver);
        machine.write(COMMON, 0x4000, One, 7);
        assert_eq!(machine.read(COMMON, 0x4000, One), 7);
        machine.write(COMMON, STATUS, One, 0);
        machine.poll(STATUS, One);
        assert_eq!(machine.read(COMMON, 0x1c, Two), 0, "the queue is gone");
        assert_eq!(machine.read(COMMON, 0x4000, One), 0);
        let driver = machine.driver(2);
        machine.set_up();
        machine.finish(driver);
    });
}

#[test]
fn a_kill_while_a_queue_is_reset_neither_loses_nor_repeats_anything() {
    at_any_store(|machine| {
        let driver = machine.driver(1);
        machine.set_up();
        machine.finish(driver);
        machine.write(COMMON, QUEUE_RESET, Two, 1);
        machine.poll(QUEUE_RESET, Two);
        assert_eq!(machine.read(COMMON, 0x1c, Two), 0);
        assert_eq!(machine.read(COMMON, STATUS, One), 0xf);
        let driver = machine.driver(2);
        machine.set_up_queue();
        machine.finish(driver);
    });
}

#[test]
fn who_goes_on_from_a_device_that_was_halted_finds_all_that_its_driver_has_set() {
    let mut machine = Machine::new(100_000, 1);
    let driver = machine.driver(1);
    machine.set_up();
    machine.write(COMMON, 0x4000, One, 7);
    let mut halted = machine.target.take().unwrap();
    while !halted.halt() {}
    drop(halted);
    assert_eq!(machine.read(COMMON, 0x4000, One), 7);
    assert_eq!(machine.read(COMMON, STATUS, One), 0xf);
    machine.finish(driver);
}
