//! All queues of a device, for devices whose queues all work alike.

use std::fmt;
use std::sync::Arc;

use super::{Handler, Service, Worker};
use crate::device::{Activation, Events};
use crate::memory::GuestRam;
use crate::queue::Queue;

/// The workers of the queues.
pub(crate) struct Workers {
    handler: Arc<dyn Handler>,
    service: Service,
    live: Option<(Arc<GuestRam>, Arc<dyn Events>)>,
    /// Also those that are ending.
    workers: Vec<(u16, Worker)>,
}

impl Workers {
    pub fn new(handler: Arc<dyn Handler>, service: Service) -> Self {
        Self {
            handler,
            service,
            live: None,
            workers: Vec::new(),
        }
    }

    pub fn activate(&mut self, activation: Activation) {
        self.live = Some((activation.ram, activation.events));
        for (index, queue) in activation.queues {
            self.enable_queue(index, queue);
        }
    }

    pub fn enable_queue(&mut self, index: u16, queue: Queue) {
        self.workers.retain(|(_, worker)| !worker.is_stopped());
        let Some((ram, events)) = &self.live else {
            return;
        };
        match Worker::start(index, queue, ram, events, &self.handler, self.service) {
            Ok(worker) => self.workers.push((index, worker)),
            Err(error) => events.needs_reset(&format_args!("queue {index} has no thread: {error}")),
        }
    }

    pub fn notify(&self, queue: u16) {
        for (_, worker) in self.of_queue(queue) {
            worker.notify();
        }
    }

    pub fn reset(&mut self) {
        self.live = None;
        for (_, worker) in &self.workers {
            worker.stop();
        }
    }

    pub fn is_reset(&self) -> bool {
        self.live.is_none() && self.workers.iter().all(|(_, worker)| worker.is_stopped())
    }

    pub fn reset_queue(&mut self, queue: u16) {
        for (_, worker) in self.of_queue(queue) {
            worker.stop();
        }
    }

    pub fn is_queue_reset(&self, queue: u16) -> bool {
        self.of_queue(queue).all(|(_, worker)| worker.is_stopped())
    }

    fn of_queue(&self, queue: u16) -> impl Iterator<Item = &(u16, Worker)> {
        self.workers
            .iter()
            .filter(move |(index, _)| *index == queue)
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers")
            .field("workers", &self.workers)
            .finish_non_exhaustive()
    }
}
