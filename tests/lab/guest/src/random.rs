//! Random numbers that are the same on each run: what breaks the backend once breaks it again.

/// Marsaglia's xorshift64.
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        Self::seeded(0)
    }

    /// Other numbers for another `seed`.
    pub fn seeded(seed: u64) -> Self {
        // Never 0, which would stay so.
        Self(0x9e37_79b9_7f4a_7c15 ^ seed)
    }

    pub fn word(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    /// One of `choices`.
    pub fn of<T: Copy>(&mut self, choices: &[T]) -> Option<T> {
        let index = (self.word() as usize).checked_rem(choices.len())?;
        choices.get(index).copied()
    }
}
