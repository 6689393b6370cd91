//! What the tests of transports have in common: a guest's memory, interrupts that are noted, and
//! where a guest's accesses go.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    missing_docs
)]

use std::sync::{Arc, Mutex};

use conf_space::Width;
use virtio::device::Device;
use virtio::ioreq::{Claim, Target, Window};
use virtio::memory::{GuestRam, Memfd};
use virtio::queue::Record;
use virtio::transport::{InterruptSink, Parts, RING_FEATURES};
use xenbus::device_model::IoSpace;

/// Notes interrupts.
#[derive(Debug, Default)]
pub struct Sink(Mutex<Interrupts>);

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Interrupts {
    pub messages: Vec<(u64, u32)>,
    pub line: bool,
}

impl Sink {
    pub fn seen(&self) -> Interrupts {
        self.0.lock().unwrap().clone()
    }
}

impl InterruptSink for Sink {
    fn msi(&self, address: u64, data: u32) {
        self.0.lock().unwrap().messages.push((address, data));
    }

    fn intx(&self, level: bool) {
        self.0.lock().unwrap().line = level;
    }
}

pub fn ram(memory: &Memfd) -> Arc<GuestRam> {
    Arc::new(GuestRam::new(Arc::new(memory.clone()), 64))
}

pub fn parts(device: impl Device + 'static, ram: Arc<GuestRam>, sink: Arc<Sink>) -> Parts {
    let records = device
        .queue_sizes()
        .iter()
        .map(|size| Record::volatile(*size).unwrap())
        .collect();
    Parts {
        name: "test".into(),
        device: Box::new(device),
        features: RING_FEATURES,
        ram,
        sink,
        records,
    }
}

/// A machine with one target, reached as a guest's CPU reaches it: through the configuration space,
/// and at the addresses that the target claims.
#[derive(Debug, Clone)]
pub struct Machine(Arc<Mutex<Box<dyn Target>>>);

impl Machine {
    pub fn new(target: impl Target + 'static) -> Self {
        Self(Arc::new(Mutex::new(Box::new(target))))
    }

    pub fn read_config(&self, offset: u64, width: Width) -> u32 {
        self.0.lock().unwrap().read(Window::Config, offset, width)
    }

    pub fn write_config(&self, offset: u64, width: Width, value: u32) {
        let mut target = self.0.lock().unwrap();
        target.write(Window::Config, offset, width, value);
    }

    /// All that it answers now.
    pub fn claims(&self) -> Vec<Claim> {
        let mut claims = Vec::new();
        self.0.lock().unwrap().claims(&mut claims);
        claims
    }

    /// Where an address is answered.
    fn find(&self, space: IoSpace, address: u64) -> Option<(Window, u64)> {
        self.claims().into_iter().find_map(|claim| {
            let range = claim.range;
            let inside = range.space == space && (range.first..=range.last).contains(&address);
            inside.then(|| (claim.window, address - range.first))
        })
    }

    /// All ones, if nobody answers.
    pub fn read(&self, space: IoSpace, address: u64, width: Width) -> u32 {
        match self.find(space, address) {
            Some((window, offset)) => self.0.lock().unwrap().read(window, offset, width),
            None => width.mask(),
        }
    }

    pub fn write(&self, space: IoSpace, address: u64, width: Width, value: u32) {
        if let Some((window, offset)) = self.find(space, address) {
            let mut target = self.0.lock().unwrap();
            target.write(window, offset, width, value & width.mask());
        }
    }
}
