//! The control queue (virtio 1.3, section 5.1.6.5).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Link, feature};
use crate::features::Features;
use crate::memory::{Reader, TooShort, Words};
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

/// What a driver has set of the card, until it is reset.
#[derive(Debug)]
pub(crate) struct Chosen {
    configured: [u8; 6],
    /// Address, and pairs, where the driver has set them.
    set: Mutex<Set>,
}

#[derive(Debug, Default)]
struct Set {
    mac: Option<[u8; 6]>,
    pairs: Option<u16>,
    kept: Option<Words>,
}

/// In a word that is kept: the driver has set it. The lowest bits are what.
const SET: u64 = 1 << 63;
const KEPT_MAC: usize = 0;
const KEPT_PAIRS: usize = 1;

impl Chosen {
    /// Words that it keeps.
    pub const WORDS: usize = 2;

    pub fn new(configured: [u8; 6]) -> Self {
        Self {
            configured,
            set: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Set> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes on what is kept, and keeps it there from now on.
    pub fn keep(&self, words: Words) {
        let value = |index| Some(words.get(index)).filter(|word| word & SET != 0);
        let mut set = self.lock();
        set.mac = value(KEPT_MAC).map(|word| {
            let [m0, m1, m2, m3, m4, m5, _, _] = word.to_le_bytes();
            [m0, m1, m2, m3, m4, m5]
        });
        set.pairs = value(KEPT_PAIRS).map(|word| (word & 0xffff) as u16);
        set.kept = Some(words);
    }

    /// As it was configured.
    pub fn forget(&self) {
        let mut set = self.lock();
        if let Some(kept) = &set.kept {
            kept.clear();
        }
        (set.mac, set.pairs) = (None, None);
    }

    pub fn mac(&self) -> [u8; 6] {
        self.lock().mac.unwrap_or(self.configured)
    }

    pub fn set_mac(&self, mac: [u8; 6]) {
        let mut set = self.lock();
        if let Some(kept) = &set.kept {
            let [m0, m1, m2, m3, m4, m5] = mac;
            let word = u64::from_le_bytes([m0, m1, m2, m3, m4, m5, 0, 0]);
            kept.set(KEPT_MAC, SET | word);
        }
        set.mac = Some(mac);
    }

    /// Pairs of queues that the driver wants to be used: one, if it has not said.
    fn pairs(&self) -> u16 {
        self.lock().pairs.unwrap_or(1)
    }

    fn set_pairs(&self, pairs: u16) {
        let mut set = self.lock();
        if let Some(kept) = &set.kept {
            kept.set(KEPT_PAIRS, SET | u64::from(pairs));
        }
        set.pairs = Some(pairs);
    }
}

/// What carries out commands.
#[derive(Debug)]
pub(crate) struct Control {
    links: Arc<[Link]>,
    chosen: Arc<Chosen>,
    chain: Chain,
}

impl Control {
    pub fn new(links: Arc<[Link]>, chosen: Arc<Chosen>) -> Self {
        Self {
            links,
            chosen,
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
                self.chosen.set_mac(mac);
                true
            }
            [MQ, MQ_VQ_PAIRS_SET] if features.contains(feature::MQ) => {
                let mut pairs = [0; 2];
                reader.read_exact(&mut pairs)?;
                self.set_pairs(u16::from_le_bytes(pairs))
            }
            _ => false,
        })
    }

    fn set_pairs(&self, pairs: u16) -> bool {
        if pairs == 0 || usize::from(pairs) > self.links.len() {
            return false;
        }
        let before = self.chosen.pairs();
        self.chosen.set_pairs(pairs);
        let attached = self.attach_pairs();
        if !attached {
            self.chosen.set_pairs(before);
        }
        attached
    }

    /// Has the kernel put packets into as many pairs of queues as the driver wants to be used.
    pub fn attach_pairs(&self) -> bool {
        let pairs = usize::from(self.chosen.pairs());
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
