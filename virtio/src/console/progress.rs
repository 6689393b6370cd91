//! A chain whose bytes are moved little by little, and how far that is: noted, so that a restart neither
//! repeats nor loses any.
//!
//! A byte stream's end cannot be asked how much it has taken. So of a process that is killed between a
//! system call and the note of it, one piece is sent twice, or is lost on its way to the guest.

use crate::memory::Words;
use crate::queue::{Chain, RingError};
use crate::turn::Turn;

/// In the word: a chain is on its way. Bits 40 to 55 are its number, those below how many bytes are done.
const MOVING: u64 = 1 << 63;
const HEAD_SHIFT: u32 = 40;
const DONE: u64 = (1 << HEAD_SHIFT) - 1;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Moving {
    /// Used again and again.
    chain: Chain,
    held: bool,
    done: usize,
    /// Of a chain that was on its way at a restart: its number, and how much was done.
    before: Option<(u16, usize)>,
    kept: Option<Words>,
}

impl Moving {
    pub fn keep(&mut self, word: Words) {
        let found = word.get(0);
        let head = (found.wrapping_shr(HEAD_SHIFT) & 0xffff) as u16;
        self.before = (found & MOVING != 0).then_some((head, (found & DONE) as usize));
        self.kept = Some(word);
    }

    /// A queue begins, with chains from before a restart or without.
    pub fn begin(&mut self, resumed: bool) {
        self.let_go();
        if !resumed {
            self.before = None;
            self.note(0);
        }
    }

    /// Forgets the chain, and lets go of its memory.
    pub fn let_go(&mut self) {
        self.chain.clear();
        (self.held, self.done) = (false, 0);
    }

    fn note(&self, word: u64) {
        if let Some(kept) = &self.kept {
            kept.set(0, word);
        }
    }

    /// Takes a chain, unless there is one. False: there is none.
    pub fn take(&mut self, turn: &mut Turn<'_>) -> Result<bool, RingError> {
        if self.held {
            return Ok(true);
        }
        if !turn.pop(&mut self.chain)? {
            self.chain.clear();
            return Ok(false);
        }
        let before = self.before.take();
        let same = before.filter(|(head, _)| *head == self.chain.head());
        self.done = same.map_or(0, |(_, done)| done);
        self.held = true;
        Ok(true)
    }

    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Bytes that are done.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Some are, or were before a restart.
    pub fn is_under_way(&self) -> bool {
        self.done > 0 || self.before.is_some()
    }

    /// That many more are.
    pub fn advance(&mut self, bytes: usize) {
        self.done = self.done.saturating_add(bytes);
        let head = u64::from(self.chain.head()) << HEAD_SHIFT;
        self.note(MOVING | head | (self.done as u64 & DONE));
    }

    /// Gives the chain back.
    pub fn finish(&mut self, turn: &mut Turn<'_>, written: usize) -> Result<(), RingError> {
        turn.complete(&self.chain, written)?;
        self.note(0);
        self.let_go();
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, missing_docs)]
mod tests {
    use super::*;
    use crate::features::Features;
    use crate::rings::{BUFFERS, Driver, Guest, Nobody, writable};

    #[test]
    fn a_chain_that_a_kill_interrupts_goes_on_where_it_was_and_the_next_begins_anew() {
        let guest = Guest::default();
        let mut driver = Driver::new(0, 8, Features::empty());
        let word = Words::volatile(1).unwrap();
        let moving = |in_flight: u16| {
            let mut moving = Moving::default();
            moving.keep(word.clone());
            moving.begin(in_flight > 0);
            moving
        };
        let head = driver.offer(&guest, &[writable(BUFFERS, 9)], None).unwrap();
        let mut queue = driver.queue(&guest);
        let mut first = moving(queue.in_flight());
        let mut turn = Turn::new(&mut queue, 0, &guest.ram, &Nobody);
        assert!(first.take(&mut turn).unwrap());
        first.chain().writer().write(b"abc");
        first.advance(3);

        let mut queue = driver.queue(&guest);
        let mut second = moving(queue.in_flight());
        let mut turn = Turn::new(&mut queue, 0, &guest.ram, &Nobody);
        assert!(second.is_under_way() && second.take(&mut turn).unwrap());
        assert_eq!(second.done(), 3);
        second.finish(&mut turn, 3).unwrap();
        assert_eq!(driver.used(&guest), Some((head, 3)));

        // The same number again, after a kill before the note was taken back.
        word.set(0, MOVING | u64::from(head) << HEAD_SHIFT | 3);
        let again = driver.offer(&guest, &[writable(BUFFERS, 9)], None).unwrap();
        assert_eq!(again, head);
        let mut queue = driver.queue(&guest);
        let mut third = moving(queue.in_flight());
        let mut turn = Turn::new(&mut queue, 0, &guest.ram, &Nobody);
        assert!(third.take(&mut turn).unwrap());
        assert_eq!(third.done(), 0);
    }
}
