//! An entropy source that serves its queue at once, on the thread that notifies. What it gives is not
//! random, so that tests can tell it from nothing.

use std::sync::Mutex;

use virtio::Features;
use virtio::device::{Activation, Device, DeviceKind};
use virtio::queue::{Chain, Queue};

pub struct Entropy {
    queue_sizes: [u16; 1],
    active: Mutex<Option<Activation>>,
}

impl Entropy {
    /// With a queue of up to `size` descriptors.
    pub fn new(size: u16) -> Self {
        Self {
            queue_sizes: [size],
            active: Mutex::new(None),
        }
    }
}

/// What the device gives at this place of a buffer.
pub fn expected(index: usize) -> u8 {
    (index as u8).wrapping_mul(7).wrapping_add(1)
}

impl Device for Entropy {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, _: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _: usize, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        *self.active.get_mut().unwrap() = Some(activation);
    }

    fn notify(&self, index: u16) {
        let mut active = self.active.lock().unwrap();
        let active = active.as_mut().expect("only live devices are notified");
        let (_, queue) = active
            .queues
            .iter_mut()
            .find(|(at, _)| *at == index)
            .expect("only enabled queues are notified");
        let (view, mut chain) = (active.ram.view(), Chain::default());
        while queue.pop(&view, &mut chain).unwrap() {
            let mut writer = chain.writer();
            let data: Vec<u8> = (0..writer.len()).map(expected).collect();
            writer.write_all(&data).unwrap();
            let written = u32::try_from(data.len()).unwrap();
            queue.complete(&view, chain.head(), written).unwrap();
        }
        if queue.should_notify(&view).unwrap() {
            active.events.used(index);
        }
    }

    fn reset(&mut self) {
        *self.active.get_mut().unwrap() = None;
    }

    fn is_reset(&self) -> bool {
        true
    }

    fn reset_queue(&mut self, queue: u16) {
        let active = self.active.get_mut().unwrap().as_mut().unwrap();
        active.queues.retain(|(index, _)| *index != queue);
    }

    fn is_queue_reset(&self, _: u16) -> bool {
        true
    }

    fn enable_queue(&mut self, index: u16, queue: Queue) {
        let active = self.active.get_mut().unwrap().as_mut().unwrap();
        active.queues.push((index, queue));
    }
}
