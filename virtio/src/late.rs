//! A device whose back-end is not there yet: it had one before a restart, and its driver is at work. What the driver sees of it is
//! answered by a stand-in, its requests wait in their queues, and when the device comes that goes on with them.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::{Activation, Device, DeviceKind};
use crate::features::Features;
use crate::memory::Words;
use crate::queue::Queue;

/// See the module.
#[derive(Debug)]
pub struct Late {
    kind: DeviceKind,
    features: Features,
    queue_sizes: Vec<u16>,
    kept_words: usize,
    state: Arc<Mutex<State>>,
}

/// Where the device is given when it is there. Whoever waits for it may have ended by then.
#[derive(Debug)]
pub struct Supply(Arc<Mutex<State>>);

enum State {
    /// For the device: what it is to go on with.
    Waiting {
        stand_in: Box<dyn Device>,
        words: Option<Words>,
        agreed: Option<Features>,
        activation: Option<Activation>,
    },
    There(Box<dyn Device>),
    /// Nobody waits any more.
    Ended,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting { .. } => "Waiting",
            Self::There(_) => "There",
            Self::Ended => "Ended",
        })
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Late {
    /// A device that is like `stand_in`, which is never given any queue.
    pub fn new(stand_in: Box<dyn Device>) -> (Self, Supply) {
        let (kind, features) = (stand_in.kind(), stand_in.features());
        let queue_sizes = stand_in.queue_sizes().to_vec();
        let kept_words = stand_in.kept_words();
        let state = Arc::new(Mutex::new(State::Waiting {
            stand_in,
            words: None,
            agreed: None,
            activation: None,
        }));
        let supply = Supply(Arc::clone(&state));
        let late = Self {
            kind,
            features,
            queue_sizes,
            kept_words,
            state,
        };
        (late, supply)
    }
}

impl Supply {
    /// The device is there, and goes on: it is to be of the same kind, with the same queues.
    pub fn give(self, mut device: Box<dyn Device>) {
        let mut state = lock(&self.0);
        let State::Waiting {
            words,
            agreed,
            activation,
            ..
        } = &mut *state
        else {
            return;
        };
        if let Some(words) = words.take() {
            device.keep(words);
        }
        if let Some(features) = *agreed {
            device.agree(features);
        }
        if let Some(activation) = activation.take() {
            let queues = activation.queues.iter();
            let queues: Vec<_> = queues.map(|(index, _)| *index).collect();
            device.activate(activation);
            // What the driver has told of meanwhile was told to nobody.
            for queue in queues {
                device.notify(queue);
            }
        }
        *state = State::There(device);
    }
}

impl State {
    /// Whoever answers the driver.
    fn device(&self) -> Option<&dyn Device> {
        match self {
            Self::Waiting {
                stand_in: device, ..
            }
            | Self::There(device) => Some(&**device),
            Self::Ended => None,
        }
    }

    fn device_mut(&mut self) -> Option<&mut Box<dyn Device>> {
        match self {
            Self::Waiting {
                stand_in: device, ..
            }
            | Self::There(device) => Some(device),
            Self::Ended => None,
        }
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        let ended = std::mem::replace(&mut *lock(&self.state), State::Ended);
        drop(ended);
    }
}

impl Device for Late {
    fn kind(&self) -> DeviceKind {
        self.kind
    }

    fn features(&self) -> Features {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        if let Some(device) = lock(&self.state).device() {
            device.read_config(offset, data);
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let Some(device) = lock(&self.state).device_mut() {
            device.write_config(offset, data);
        }
    }

    fn kept_words(&self) -> usize {
        self.kept_words
    }

    fn keep(&mut self, new: Words) {
        let mut state = lock(&self.state);
        if let State::Waiting { words, .. } = &mut *state {
            *words = Some(new.clone());
        }
        if let Some(device) = state.device_mut() {
            device.keep(new);
        }
    }

    fn agree(&mut self, features: Features) {
        let mut state = lock(&self.state);
        if let State::Waiting { agreed, .. } = &mut *state {
            *agreed = Some(features);
        }
        if let Some(device) = state.device_mut() {
            device.agree(features);
        }
    }

    fn activate(&mut self, new: Activation) {
        match &mut *lock(&self.state) {
            State::Waiting { activation, .. } => *activation = Some(new),
            State::There(device) => device.activate(new),
            State::Ended => {}
        }
    }

    fn notify(&self, queue: u16) {
        if let State::There(device) = &*lock(&self.state) {
            device.notify(queue);
        }
    }

    fn reset(&mut self) {
        let mut state = lock(&self.state);
        if let State::Waiting {
            agreed, activation, ..
        } = &mut *state
        {
            (*agreed, *activation) = (None, None);
        }
        if let Some(device) = state.device_mut() {
            device.reset();
        }
    }

    fn is_reset(&self) -> bool {
        match &*lock(&self.state) {
            State::There(device) => device.is_reset(),
            State::Waiting { .. } | State::Ended => true,
        }
    }

    fn reset_queue(&mut self, queue: u16) {
        match &mut *lock(&self.state) {
            State::Waiting {
                activation: Some(activation),
                ..
            } => activation.queues.retain(|(index, _)| *index != queue),
            State::There(device) => device.reset_queue(queue),
            State::Waiting { .. } | State::Ended => {}
        }
    }

    fn is_queue_reset(&self, queue: u16) -> bool {
        match &*lock(&self.state) {
            State::There(device) => device.is_queue_reset(queue),
            State::Waiting { .. } | State::Ended => true,
        }
    }

    fn enable_queue(&mut self, index: u16, queue: Queue) {
        match &mut *lock(&self.state) {
            State::Waiting {
                activation: Some(activation),
                ..
            } => activation.queues.push((index, queue)),
            State::There(device) => device.enable_queue(index, queue),
            State::Waiting { .. } | State::Ended => {}
        }
    }
}
