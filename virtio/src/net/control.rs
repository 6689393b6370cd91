//! The control queue (virtio 1.3, section 5.1.6.5).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Link, feature};
use crate::features::Features;
use crate::memory::{Reader, TooShort};
use crate::queue::{Chain, RingError};
use crate::turn::{Progress, Turn};

/// Classes of commands, and commands.
const RX: u8 = 0;
const RX_LAST: u8 = 5;
const MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;

/// The answer, one byte.
const OK: u8 = 0;
const ERR: u8 = 1;

/// Commands that are answered before packets have their turn.
const BATCH: usize = 16;

/// The card's address.
#[derive(Debug)]
pub(crate) struct Mac(AtomicU64);

impl Mac {
    pub fn new(mac: [u8; 6]) -> Self {
        let new = Self(AtomicU64::new(0));
        new.set(mac);
        new
    }

    pub fn get(&self) -> [u8; 6] {
        let [m0, m1, m2, m3, m4, m5, _, _] = self.0.load(Ordering::Relaxed).to_le_bytes();
        [m0, m1, m2, m3, m4, m5]
    }

    pub fn set(&self, [m0, m1, m2, m3, m4, m5]: [u8; 6]) {
        let word = u64::from_le_bytes([m0, m1, m2, m3, m4, m5, 0, 0]);
        self.0.store(word, Ordering::Relaxed);
    }
}

/// What carries out commands.
#[derive(Debug)]
pub(crate) struct Control {
    links: Arc<[Link]>,
    mac: Arc<Mac>,
    chain: Chain,
}

impl Control {
    pub fn new(links: Arc<[Link]>, mac: Arc<Mac>) -> Self {
        Self {
            links,
            mac,
            chain: Chain::default(),
        }
    }

    pub fn serve(
        &mut self,
        turn: &mut Turn<'_>,
        features: Features,
    ) -> Result<Progress, RingError> {
        let mut chain = std::mem::take(&mut self.chain);
        let progress = self.answer_all(turn, features, &mut chain);
        chain.clear();
        self.chain = chain;
        progress
    }

    fn answer_all(
        &self,
        turn: &mut Turn<'_>,
        features: Features,
        chain: &mut Chain,
    ) -> Result<Progress, RingError> {
        for _ in 0..BATCH {
            if !turn.pop(chain)? {
                return turn.end();
            }
            let answer = match self.command(chain.reader(), features) {
                Ok(true) => OK,
                Ok(false) | Err(TooShort) => ERR,
            };
            let mut ack = chain.writer();
            ack.take(ack.len().saturating_sub(1));
            let written = ack.write(&[answer]);
            turn.complete(chain, written)?;
        }
        turn.announce()?;
        Ok(Progress::More)
    }

    fn command(&self, mut reader: Reader<'_>, features: Features) -> Result<bool, TooShort> {
        let mut header = [0; 2];
        reader.read_exact(&mut header)?;
        Ok(match header {
            // All that arrives is given to the driver, which is always allowed.
            [RX, command] if command <= RX_LAST => !reader.is_empty(),
            [MAC, MAC_TABLE_SET] => {
                take_table(&mut reader)?;
                take_table(&mut reader)?;
                true
            }
            [MAC, MAC_ADDR_SET] => {
                let mut mac = [0; 6];
                reader.read_exact(&mut mac)?;
                self.mac.set(mac);
                true
            }
            [MQ, MQ_VQ_PAIRS_SET] if features.contains(feature::MQ) => {
                let mut pairs = [0; 2];
                reader.read_exact(&mut pairs)?;
                self.set_pairs(u16::from_le_bytes(pairs).into())
            }
            _ => false,
        })
    }

    /// Has the kernel put packets into the first `pairs` of queues.
    pub fn set_pairs(&self, pairs: usize) -> bool {
        if pairs == 0 || pairs > self.links.len() {
            return false;
        }
        // A tap with one queue cannot let go of it.
        let several = self.links.len() > 1;
        let mut links = self.links.iter().enumerate();
        links.all(|(index, link)| !several || link.set_attached(index < pairs).is_ok())
    }
}

/// A count and as many addresses.
fn take_table(reader: &mut Reader<'_>) -> Result<(), TooShort> {
    let mut count = [0; 4];
    reader.read_exact(&mut count)?;
    let len = (u32::from_le_bytes(count) as usize).saturating_mul(6);
    if reader.take(len).len() == len {
        Ok(())
    } else {
        Err(TooShort)
    }
}
