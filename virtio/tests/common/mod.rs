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

use std::sync::{Arc, Mutex, OnceLock};

use conf_space::Width;
use virtio::device::Device;
use virtio::ioreq::{Claim, Target, Window};
use virtio::memory::{GuestRam, Memfd, Words};
use virtio::transport::{self, InterruptSink, Parts, RING_FEATURES};
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

/// What outlives a restart.
#[derive(Debug, Clone, Default)]
pub struct Notes(Arc<OnceLock<Words>>);

impl Notes {
    /// As it would be found after a kill now.
    pub fn snapshot(&self) -> Self {
        let words = self.0.get().unwrap();
        let copy = Words::volatile(words.count()).unwrap();
        (0..words.count()).for_each(|index| copy.set(index, words.get(index)));
        Self(Arc::new(copy.into()))
    }

    pub fn parts(
        &self,
        device: impl Device + 'static,
        ram: Arc<GuestRam>,
        sink: Arc<Sink>,
    ) -> Parts {
        let words = || Words::volatile(transport::Notes::words(&device)).unwrap();
        let words = self.0.get_or_init(words).clone();
        Parts {
            name: "test".into(),
            features: RING_FEATURES,
            ram,
            sink,
            notes: transport::Notes::new(words, &device).unwrap(),
            device: Box::new(device),
        }
    }
}

pub fn parts(device: impl Device + 'static, ram: Arc<GuestRam>, sink: Arc<Sink>) -> Parts {
    Notes::default().parts(device, ram, sink)
}

/// Makes a machine's target anew, from what outlives a restart.
pub type Restart = Box<dyn FnMut() -> Box<dyn Target> + Send>;

/// A machine with one target, reached as a guest's CPU reaches it: through the configuration space,
/// and at the addresses that the target claims.
#[derive(Clone)]
pub struct Machine(Arc<Mutex<Inner>>);

struct Inner {
    target: Option<Box<dyn Target>>,
    restart: Option<Restart>,
}

impl Inner {
    fn target(&mut self) -> &mut dyn Target {
        if let Some(restart) = &mut self.restart {
            self.target = None;
            self.target = Some(restart());
        }
        self.target.as_mut().unwrap().as_mut()
    }
}

impl Machine {
    pub fn new(target: impl Target + 'static) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            target: Some(Box::new(target)),
            restart: None,
        })))
    }

    /// A machine whose target is made anew before each access.
    pub fn restarting(restart: Restart) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            target: None,
            restart: Some(restart),
        })))
    }

    pub fn read_config(&self, offset: u64, width: Width) -> u32 {
        let mut inner = self.0.lock().unwrap();
        inner.target().read(Window::Config, offset, width)
    }

    pub fn write_config(&self, offset: u64, width: Width, value: u32) {
        let mut inner = self.0.lock().unwrap();
        write(inner.target(), Window::Config, offset, width, value);
    }

    /// All that it answers now.
    pub fn claims(&self) -> Vec<Claim> {
        let mut claims = Vec::new();
        self.0.lock().unwrap().target().claims(&mut claims);
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
            Some((window, offset)) => {
                let mut inner = self.0.lock().unwrap();
                inner.target().read(window, offset, width)
            }
            None => width.mask(),
        }
    }

    pub fn write(&self, space: IoSpace, address: u64, width: Width, value: u32) {
        if let Some((window, offset)) = self.find(space, address) {
            let mut inner = self.0.lock().unwrap();
            let value = value & width.mask();
            write(inner.target(), window, offset, width, value);
        }
    }
}

/// As a CPU does, which goes on when it is let.
fn write(target: &mut dyn Target, window: Window, offset: u64, width: Width, value: u32) {
    target.write(window, offset, width, value);
    while target.holds(window, offset) {
        std::thread::yield_now();
    }
}
