//! What others can see of a guest's operations.

use std::sync::Arc;
use std::time::Duration;

use xenbus::pciif::PciOp;

use super::meter::Meter;
use super::operation::Reply;
use super::tap::{Event, Tap};

/// A guest's operations, counted and to be listened to.
#[derive(Debug, Default)]
pub struct Telemetry {
    /// What is counted.
    pub meter: Meter,
    /// Where one can listen.
    pub tap: Arc<Tap>,
}

impl Telemetry {
    /// Records an operation that was answered now. To be called by the guest's own thread only.
    pub fn record(&self, op: &PciOp, reply: &Reply, took: Duration) {
        self.meter.count(op.command(), reply.outcome, took);
        if self.tap.is_open() {
            self.tap.push(&Event::new(op, reply, took));
        }
    }
}
