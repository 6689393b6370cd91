//! One thread that has the kernel work on a queue's requests, many at a time.

use std::io;
use std::sync::Once;

use super::{BATCH, Handler, Lane, Patience, ServeError, Shared, Wake};
use crate::memory::{Done, Outcome, Ring, Transfer, View};
use crate::queue::{Chain, RingError};

/// The most requests of a queue that the kernel has at a time.
const DEPTH: u16 = 128;

/// A ring for a queue of `size`, and what its thread sleeps on, if the device has a file for one.
pub(super) fn ring(handler: &dyn Handler, size: u16) -> Option<(Ring, Wake)> {
    let file = handler.file()?;
    let made = Wake::descriptor().and_then(|wake| {
        let fd = wake.fd().ok_or(io::ErrorKind::Unsupported)?;
        Ok((Ring::new(file, fd, size.min(DEPTH).into())?, wake))
    });
    let refused = |error| {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            log::warn!(
                "disks are served by threads, as io_uring, which is faster, cannot be used: {error}; see the sysctl kernel.io_uring_disabled, and what sandbox this runs in"
            );
        });
    };
    made.map_err(refused).ok()
}

impl Shared {
    pub(super) fn serve_by(&self, ring: &mut Ring) -> Result<(), ServeError> {
        let mut patience = Patience::new(self.service.poll);
        while !self.is_stopping() {
            if !self.round(ring)? {
                self.wait_for_either(ring, &mut patience)?;
            }
        }
        // What is under way is given back even though there will be no more.
        while ring.in_flight() > 0 {
            ring.wait()?;
            let view = self.ram.view();
            let lane = &mut *self.lane();
            self.give_back(ring, lane, &view)?;
            self.announce(lane, &view)?;
        }
        Ok(())
    }

    /// Gives back what is done, and has the kernel begin all that is there. True: there was something.
    fn round(&self, ring: &mut Ring) -> Result<bool, ServeError> {
        let mut view = self.ram.view();
        let lane = &mut *self.lane();
        let mut any = self.give_back(ring, lane, &view)?;
        while !self.is_stopping()
            && let Some(mut chain) = ring.chain()
        {
            if !lane.queue.take(&self.ram, &mut view, &mut chain)? {
                ring.recycle(chain);
                break;
            }
            any = true;
            match self.handler.transfer(&chain) {
                Some(transfer) => self.start(ring, lane, &view, chain, transfer)?,
                None => {
                    if self.handler.takes_long(&chain) {
                        ring.submit()?;
                        self.announce(lane, &view)?;
                    }
                    self.do_it(ring, lane, &view, chain)?;
                }
            }
            if ring.has_enough() {
                self.submit(ring, lane, &view)?;
            }
        }
        any |= self.submit(ring, lane, &view)?;
        Ok(any)
    }

    /// Begins what was started. The kernel is done at once with what the host has in its cache: that is
    /// given back. True: there was something.
    fn submit(&self, ring: &mut Ring, lane: &mut Lane, view: &View) -> Result<bool, ServeError> {
        ring.submit()?;
        let any = self.give_back(ring, lane, view)?;
        self.announce(lane, view)?;
        Ok(any)
    }

    fn start(
        &self,
        ring: &mut Ring,
        lane: &mut Lane,
        view: &View,
        chain: Chain,
        transfer: Transfer,
    ) -> Result<(), ServeError> {
        match ring.start(chain, transfer) {
            Ok(()) => Ok(()),
            Err(chain) => self.do_it(ring, lane, view, chain),
        }
    }

    /// Without the kernel's doing it meanwhile.
    fn do_it(
        &self,
        ring: &mut Ring,
        lane: &mut Lane,
        view: &View,
        chain: Chain,
    ) -> Result<(), ServeError> {
        let written = self.handler.handle(&chain)?;
        self.complete(lane, view, chain.head(), written)?;
        ring.recycle(chain);
        Ok(())
    }

    fn give_back(&self, ring: &mut Ring, lane: &mut Lane, view: &View) -> Result<bool, ServeError> {
        let mut any = false;
        while let Some(done) = ring.next_done() {
            any = true;
            let Done {
                chain,
                transfer,
                outcome,
            } = done;
            let written = match outcome {
                Outcome::Whole => self.handler.finish(&chain, transfer)?,
                Outcome::Lost => self.handler.fail(&chain)?,
                // Done again from the beginning, which changes nothing of what was done already.
                Outcome::Part => {
                    self.do_it(ring, lane, view, chain)?;
                    continue;
                }
            };
            self.complete(lane, view, chain.head(), written)?;
            ring.recycle(chain);
        }
        Ok(any)
    }

    fn complete(
        &self,
        lane: &mut Lane,
        view: &View,
        head: u16,
        written: u32,
    ) -> Result<(), RingError> {
        lane.queue.complete(view, head, written)?;
        lane.unannounced = lane.unannounced.saturating_add(1);
        if lane.unannounced >= BATCH {
            self.announce(lane, view)?;
        }
        Ok(())
    }

    /// Waits until the driver or the kernel may have something.
    fn wait_for_either(&self, ring: &mut Ring, patience: &mut Patience) -> Result<(), RingError> {
        // What the driver has besides can wait: only the kernel can help.
        if ring.is_full() {
            if !ring.has_done() {
                self.sleep();
            }
            return Ok(());
        }
        if patience.is_curious() {
            self.lane().queue.disable_notify(&self.ram.view())?;
            if patience.look(|| Ok::<_, RingError>(ring.has_done() || self.has_work()?))? {
                return Ok(());
            }
        }
        let more = self.lane().queue.enable_notify(&self.ram.view())?;
        if !more && !ring.has_done() {
            patience.sleep(|| self.sleep());
        }
        Ok(())
    }
}
