//! The control queue (virtio 1.3, section 5.1.6.5).

use std::io;
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
    /// As many pairs as there are.
    most: u16,
    chosen: Arc<Chosen>,
    chain: Chain,
    pending: Option<Pending>,
}

/// A command in `chain` that is not answered yet, for another number of pairs.
#[derive(Debug, Clone, Copy)]
enum Pending {
    /// The kernel is to be told.
    Asked { before: u16 },
    /// It was. The answer.
    Done(bool),
}

/// What a command comes to.
enum Outcome {
    Answer(bool),
    /// So many pairs are to be used.
    Pairs(u16),
}

impl Control {
    pub fn new(most: u16, chosen: Arc<Chosen>) -> Self {
        Self {
            most,
            chosen,
            chain: Chain::default(),
            pending: None,
        }
    }

    /// How many pairs are to be used.
    pub fn pairs(&self) -> u16 {
        self.chosen.pairs()
    }

    /// How many the kernel is to be told of, before there are more commands.
    pub fn wanted_pairs(&self) -> Option<u16> {
        matches!(self.pending, Some(Pending::Asked { .. })).then(|| self.pairs())
    }

    /// The kernel was told.
    pub fn attached(&mut self, done: bool) {
        if let Some(Pending::Asked { before }) = self.pending {
            if !done {
                self.chosen.set_pairs(before);
            }
            self.pending = Some(Pending::Done(done));
        }
    }

    /// The device or its queue is reset: who has asked gets no answer.
    pub fn forget(&mut self) {
        self.pending = None;
        self.chain.clear();
    }

    pub fn serve(
        &mut self,
        turn: &mut Turn<'_>,
        features: Features,
    ) -> Result<Progress, RingError> {
        let mut chain = std::mem::take(&mut self.chain);
        let progress = self.answer_all(turn, features, &mut chain);
        if self.pending.is_none() {
            chain.clear();
        }
        self.chain = chain;
        progress
    }

    fn answer_all(
        &mut self,
        turn: &mut Turn<'_>,
        features: Features,
        chain: &mut Chain,
    ) -> Result<Progress, RingError> {
        for _ in 0..BATCH {
            let answer = match self.pending.take() {
                Some(Pending::Done(answer)) => answer,
                Some(asked) => {
                    self.pending = Some(asked);
                    return Ok(Progress::Host);
                }
                None => {
                    if !turn.pop(chain)? {
                        return turn.end();
                    }
                    match self.command(chain.reader(), features) {
                        Ok(Outcome::Answer(answer)) => answer,
                        Ok(Outcome::Pairs(pairs)) => {
                            let before = self.chosen.pairs();
                            self.chosen.set_pairs(pairs);
                            self.pending = Some(Pending::Asked { before });
                            break;
                        }
                        Err(TooShort) => false,
                    }
                }
            };
            let mut ack = chain.writer();
            ack.take(ack.len().saturating_sub(1));
            let written = ack.write(&[if answer { OK } else { ERR }]);
            turn.complete(chain, written)?;
        }
        turn.announce()?;
        Ok(Progress::More)
    }

    fn command(&self, mut reader: Reader<'_>, features: Features) -> Result<Outcome, TooShort> {
        let mut header = [0; 2];
        reader.read_exact(&mut header)?;
        Ok(Outcome::Answer(match header {
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
                let pairs = u16::from_le_bytes(pairs);
                if (1..=self.most).contains(&pairs) {
                    return Ok(Outcome::Pairs(pairs));
                }
                false
            }
            _ => false,
        }))
    }
}

/// Has the kernel put packets into as many pairs of queues as the driver wants to be used.
///
/// # Errors
/// The kernel's.
pub(super) fn attach(links: &[Link], pairs: u16) -> io::Result<()> {
    // A tap with one queue cannot let go of it.
    if links.len() < 2 {
        return Ok(());
    }
    let mut links = links.iter().enumerate();
    links.try_for_each(|(index, link)| link.set_attached(index < usize::from(pairs)))
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
