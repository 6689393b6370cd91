//! What a driver does to queues.

use super::{Core, Phase, QueuePhase, QueueState};
use crate::features::Features;
use crate::queue::{Queue, QueueConfig};
use crate::status::{Interface, Status};
use crate::transport::NO_VECTOR;

impl Core {
    fn selected(&self) -> Option<&QueueState> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// What the driver has set of the queue that it has selected; `None`: there is no such queue.
    pub fn queue(&self) -> Option<&QueueConfig> {
        self.selected().map(|queue| &queue.config)
    }

    /// The driver sets something of the queue that it has selected. Ignored once the queue is
    /// enabled.
    pub fn configure_queue(&mut self, set: impl FnOnce(&mut QueueConfig)) {
        let resetting = self.is_resetting();
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
            && !queue.config.ready
            && queue.phase != QueuePhase::Resetting
            && !resetting
        {
            set(&mut queue.config);
        }
    }

    /// The driver enables the queue that it has selected. With a live device that is possible for a
    /// queue that was reset.
    pub fn enable_queue(&mut self) {
        let phase = self.selected().map(|queue| queue.phase);
        match (self.phase, phase) {
            (Phase::Idle, _) => self.configure_queue(|config| config.ready = true),
            (Phase::Live, Some(QueuePhase::Reset)) => {
                self.configure_queue(|config| config.ready = true);
                // A queue that is not noted as ready is taken to have nothing in flight.
                self.save();
                self.start_queue(self.queue_select);
            }
            _ => {}
        }
    }

    /// A driver of virtio-mmio takes the selected queue away (virtio 1.3, section 4.2.2).
    pub fn disable_queue(&mut self) {
        self.stop_queue();
        let resetting = self.is_resetting();
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
            && matches!(queue.phase, QueuePhase::Stopped | QueuePhase::Reset)
            && !resetting
        {
            queue.config.ready = false;
        }
    }

    /// Gives a live device a queue.
    fn start_queue(&mut self, index: u16) {
        let features = self.features();
        let view = self.ram.view();
        let Some(queue) = self.queues.get_mut(usize::from(index)) else {
            return;
        };
        let record = queue.record.clone();
        let ring: Result<Queue, _> = queue.config.activate(&view, features, record);
        match ring {
            Ok(ring) => {
                queue.phase = QueuePhase::Running;
                self.device.enable_queue(index, ring);
            }
            Err(error) => self.refuse(index, &error),
        }
    }

    /// The driver resets the queue that it has selected (VIRTIO_F_RING_RESET).
    pub fn reset_queue(&mut self) {
        if self.features().contains(Features::RING_RESET) {
            self.stop_queue();
        }
    }

    /// Whether the reset of the selected queue is still under way.
    pub fn is_queue_resetting(&mut self) -> bool {
        self.poll_queue_reset();
        self.selected()
            .is_some_and(|queue| queue.phase == QueuePhase::Resetting)
    }

    fn stop_queue(&mut self) {
        let index = self.queue_select;
        if self.phase != Phase::Live {
            return;
        }
        if let Some(queue) = self.queues.get_mut(usize::from(index))
            && queue.phase == QueuePhase::Running
        {
            queue.phase = QueuePhase::Resetting;
            // Whoever comes after a kill goes on with the reset.
            self.save();
            self.device.reset_queue(index);
            self.poll_queue_reset();
        }
    }

    /// Finishes the reset of the selected queue when the device has.
    pub fn poll_queue_reset(&mut self) {
        let index = self.queue_select;
        if let Some(queue) = self.queues.get_mut(usize::from(index))
            && queue.phase == QueuePhase::Resetting
            && self.device.is_queue_reset(index)
        {
            queue.config.reset();
            queue.record.clear();
            queue.phase = QueuePhase::Reset;
            self.signals.lock().set_queue_vector(index, NO_VECTOR);
            self.save();
        }
    }

    /// How the used ring of the selected legacy queue is aligned.
    pub fn queue_align(&self) -> u32 {
        self.selected().map_or(0, |queue| queue.align)
    }

    pub fn set_queue_align(&mut self, align: u32) {
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) {
            queue.align = align;
        }
    }

    /// Page number of the selected legacy queue; 0: it is nowhere.
    pub fn queue_page(&self) -> u32 {
        let start = self
            .queue()
            .filter(|config| config.ready)
            .map_or(0, |config| config.descriptors);
        let page = start.checked_div(self.guest_page_size.into()).unwrap_or(0);
        (page & 0xffff_ffff) as u32
    }

    /// A legacy driver puts the selected queue somewhere, or takes it away with 0. A device that
    /// has it already does not move it.
    pub fn set_queue_page(&mut self, page: u32) {
        if self.is_resetting() {
            return;
        }
        if page == 0 {
            self.stop_queue();
        }
        let base = u64::from(page).saturating_mul(self.guest_page_size.into());
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
            && matches!(queue.phase, QueuePhase::Stopped | QueuePhase::Reset)
        {
            let align = queue.align.into();
            queue.config.set_legacy(base, align);
        }
    }

    /// The driver has made buffers available in a queue.
    pub fn notify(&mut self, index: u16) {
        if self.interface == Interface::Legacy {
            self.start_late(index);
        }
        let running = |queue: &QueueState| queue.phase == QueuePhase::Running;
        if self.phase == Phase::Live && self.queues.get(usize::from(index)).is_some_and(running) {
            self.device.notify(index);
        }
    }

    /// Legacy drivers use the device before they set DRIVER_OK, and may set up a queue after it
    /// (virtio 1.3, section 3.1.2).
    fn start_late(&mut self, index: u16) {
        let status = self.signals.lock().status.get();
        let broken = Status::FAILED | Status::DEVICE_NEEDS_RESET;
        if !status.contains(Status::DRIVER) || status.intersects(broken) {
            return;
        }
        let waiting = |queue: &QueueState| {
            queue.config.ready && matches!(queue.phase, QueuePhase::Stopped | QueuePhase::Reset)
        };
        if !self.queues.get(usize::from(index)).is_some_and(waiting) {
            return;
        }
        match self.phase {
            Phase::Idle => self.activate(),
            Phase::Live => self.start_queue(index),
            Phase::Resetting(_) => return,
        }
        self.save();
    }
}
