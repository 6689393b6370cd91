//! What there is to see of a device.

use super::{Core, Phase};
use crate::features::Features;
use crate::inspect::{DeviceView, QueueView, indices};
use crate::transport::NO_VECTOR;

impl Core {
    /// The device as its driver has it now.
    pub fn inspect(&self) -> DeviceView {
        let memory = self.ram.view();
        let packed = self.features().contains(Features::RING_PACKED);
        let msix = self.signals.is_msix_enabled();
        let state = self.signals.lock();
        let queue = |(index, queue): (u16, &super::QueueState)| {
            let config = &queue.config;
            let vector = state.queue_vector(index);
            QueueView {
                size: config.size,
                max_size: config.max_size(),
                ready: config.ready,
                descriptors: config.descriptors,
                driver: config.driver,
                device: config.device,
                indices: (config.ready && !packed)
                    .then(|| indices(&memory, config))
                    .flatten(),
                in_flight: queue.record.in_flight(config.max_size()),
                vector: (vector != NO_VECTOR).then_some(vector),
            }
        };
        DeviceView {
            kind: self.kind(),
            status: state.status.get(),
            interface: self.interface,
            offered: Features::from_bits_retain(self.offered(self.interface)),
            chosen: self.features(),
            msix,
            queues: (0u16..).zip(&self.queues).map(queue).collect(),
        }
    }

    /// Has the device stop for good, so that another one can go on from its notes. True: nothing of it touches the guest's memory any
    /// more. To be asked again until then.
    pub fn halt(&mut self) -> bool {
        if self.phase != Phase::Idle {
            // A reset forgets what the device keeps, which is the next one's now.
            let Ok(forgotten) = self.notes.device().copy() else {
                return false;
            };
            self.device.keep(forgotten);
            self.device.reset();
        }
        self.device.is_reset()
    }
}
