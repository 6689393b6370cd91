//! MSI-X of an emulated function: the table, the pending bits, and when a message goes out (PCI
//! Express Base Specification 6.0, sections 6.1.4 and 7.7.2).

use crate::access::Width::{self, Four};
use crate::registers::Register;
pub use crate::registers::msix::ENTRY_BYTES;
use crate::registers::msix::control;

/// Most vectors of a function.
pub const MAX_VECTORS: u16 = 2048;

/// Message address, low half.
pub const ADDRESS: Register =
    Register::new("Message Address", 0x0, Four, "PCIe 7.7.2.6").rw(0xffff_fffc);
/// Message address, high half.
pub const ADDRESS_HIGH: Register =
    Register::new("Message Upper Address", 0x4, Four, "PCIe 7.7.2.7").rw(0xffff_ffff);
/// Message data.
pub const DATA: Register = Register::new("Message Data", 0x8, Four, "PCIe 7.7.2.8").rw(0xffff_ffff);
/// Vector control: bit 0 masks the vector.
pub const VECTOR_CONTROL: Register =
    Register::new("Vector Control", 0xc, Four, "PCIe 7.7.2.9").rw(MASKED);

/// The vector is masked.
const MASKED: u32 = 1;

/// A memory write that is an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Message {
    /// Where.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// One entry of the table, as it is laid out. Masked after a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Message address, low half; the two lowest bits are zero.
    pub address: u32,
    /// Message address, high half.
    pub address_high: u32,
    /// Message data.
    pub data: u32,
    /// The vector is masked.
    pub masked: bool,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            address: 0,
            address_high: 0,
            data: 0,
            masked: true,
        }
    }
}

impl Entry {
    const fn message(&self) -> Message {
        Message {
            address: (self.address_high as u64) << 32 | self.address as u64,
            data: self.data,
        }
    }

    /// Whether messages wait. Not those that Xen makes events of, of which a vector of 0 (data, bits
    /// 7:0), which no processor takes, is the sign: a guest masks the event, and leaves its entry
    /// masked for ever (Linux, `xen-pirq`).
    const fn holds_back(&self) -> bool {
        let is_event = self.data & 0xff == 0 && self.address != 0;
        self.masked && !is_event
    }

    fn get(&self, byte: u16) -> u8 {
        let register = match byte & !0x3 {
            offset if offset == ADDRESS.offset => self.address,
            offset if offset == ADDRESS_HIGH.offset => self.address_high,
            offset if offset == DATA.offset => self.data,
            _ => u32::from(self.masked),
        };
        (register.wrapping_shr(shift(byte)) & 0xff) as u8
    }

    fn set(&mut self, byte: u16, value: u8) {
        let put = |old: u32, register: &Register| {
            let lane = Width::One.mask().wrapping_shl(shift(byte)) & register.rw;
            (old & !lane) | (u32::from(value).wrapping_shl(shift(byte)) & lane)
        };
        match byte & !0x3 {
            offset if offset == ADDRESS.offset => self.address = put(self.address, &ADDRESS),
            offset if offset == ADDRESS_HIGH.offset => {
                self.address_high = put(self.address_high, &ADDRESS_HIGH);
            }
            offset if offset == DATA.offset => self.data = put(self.data, &DATA),
            _ => {
                self.masked = put(u32::from(self.masked), &VECTOR_CONTROL) != 0;
            }
        }
    }
}

const fn shift(byte: u16) -> u32 {
    (byte as u32 & 3).wrapping_mul(8)
}

/// The table and the pending bits of one function, and its control word as far as it decides on
/// messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Msix {
    vectors: Vec<Vector>,
    enabled: bool,
    function_masked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Vector {
    entry: Entry,
    pending: bool,
}

impl Msix {
    /// A table of this many vectors, at most [`MAX_VECTORS`], all masked.
    pub fn new(vectors: u16) -> Self {
        Self {
            vectors: vec![Vector::default(); usize::from(vectors.min(MAX_VECTORS))],
            enabled: false,
            function_masked: false,
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(MAX_VECTORS)
    }

    /// Whether the function uses MSI-X.
    pub const fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The guest has written the message control word. `send` gets the messages that were held back
    /// and no longer are.
    pub fn set_control(&mut self, control: u16, mut send: impl FnMut(Message)) {
        self.enabled = control & control::ENABLE != 0;
        self.function_masked = control & control::FUNCTION_MASK != 0;
        if self.enabled && !self.function_masked {
            for vector in &mut self.vectors {
                release(vector, &mut send);
            }
        }
    }

    /// The function raises a vector: the message to send now. `None` if it is masked, which makes it
    /// pending, if MSI-X is off, or if there is no such vector.
    pub fn raise(&mut self, vector: u16) -> Option<Message> {
        let masked = self.function_masked;
        let enabled = self.enabled;
        let vector = self.vectors.get_mut(usize::from(vector))?;
        if !enabled {
            return None;
        }
        if masked || vector.entry.holds_back() {
            vector.pending = true;
            return None;
        }
        Some(vector.entry.message())
    }

    /// Reads the table, from `offset` bytes behind its start. Zero behind its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in from(offset).zip(data) {
            let (index, within) = place(at);
            *byte = self
                .vectors
                .get(index)
                .map_or(0, |vector| vector.entry.get(within));
        }
    }

    /// Writes the table, from `offset` bytes behind its start; ignored behind its end. `send` gets the
    /// messages that were held back and no longer are.
    pub fn write_table(&mut self, offset: u64, data: &[u8], mut send: impl FnMut(Message)) {
        let sending = self.enabled && !self.function_masked;
        let mut bytes = from(offset).zip(data).peekable();
        while let Some((at, byte)) = bytes.next() {
            let (index, within) = place(at);
            let Some(vector) = self.vectors.get_mut(index) else {
                return;
            };
            vector.entry.set(within, *byte);
            // Only when all that is written to an entry is there.
            let complete = bytes.peek().is_none_or(|(next, _)| place(*next).0 != index);
            // What is still masked may be half written: that it is an event shows when it is raised.
            if complete && sending && !vector.entry.masked {
                release(vector, &mut send);
            }
        }
    }

    /// Reads the pending bits, from `offset` bytes behind their start: bit n of byte m is vector
    /// 8m + n. They cannot be written.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in from(offset).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            *byte = (0u32..8)
                .zip(self.vectors.iter().skip(first))
                .filter(|(_, vector)| vector.pending)
                .fold(0, |bits, (bit, _)| bits | 1u8.wrapping_shl(bit));
        }
    }

    /// The entries, to be kept over a restart.
    pub fn entries(&self) -> impl Iterator<Item = Entry> {
        self.vectors.iter().map(|vector| vector.entry)
    }

    /// Takes on entries from before a restart, which nothing is pending of.
    pub fn restore(&mut self, entries: impl IntoIterator<Item = Entry>) {
        for (vector, entry) in self.vectors.iter_mut().zip(entries) {
            *vector = Vector {
                entry,
                pending: false,
            };
        }
    }
}

/// The bytes from `offset` on. No table reaches the last one, which stands for all behind it.
fn from(offset: u64) -> impl Iterator<Item = u64> {
    (0u64..).map(move |byte| offset.saturating_add(byte))
}

/// The entry that a byte of the table belongs to, and its place there.
fn place(at: u64) -> (usize, u16) {
    let within = (at & 0xf) as u16;
    (usize::try_from(at >> 4).unwrap_or(usize::MAX), within)
}

fn release(vector: &mut Vector, send: &mut impl FnMut(Message)) {
    if vector.pending && !vector.entry.holds_back() {
        vector.pending = false;
        send(vector.entry.message());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ON: u16 = control::ENABLE;
    const HELD: u16 = control::ENABLE | control::FUNCTION_MASK;

    fn program(
        msix: &mut Msix,
        vector: u64,
        address: u64,
        data: u32,
        masked: bool,
    ) -> Vec<Message> {
        let mut entry = address.to_le_bytes().to_vec();
        entry.extend(data.to_le_bytes());
        entry.extend(u32::from(masked).to_le_bytes());
        let mut sent = Vec::new();
        msix.write_table(vector * 16, &entry, |message| sent.push(message));
        sent
    }

    fn pending(msix: &Msix) -> u64 {
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        u64::from_le_bytes(bits)
    }

    #[test]
    fn a_vector_sends_what_the_guest_wrote() {
        let mut msix = Msix::new(3);
        msix.set_control(ON, |_| panic!("nothing was pending"));
        program(&mut msix, 2, 0xfee0_1000, 0x4041, false);
        assert_eq!(
            msix.raise(2),
            Some(Message {
                address: 0xfee0_1000,
                data: 0x4041
            })
        );
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn a_message_that_xen_makes_an_event_of_goes_out_though_its_entry_is_masked() {
        let mut msix = Msix::new(1);
        msix.set_control(ON, |_| {});
        program(&mut msix, 0, 0xfee1_6000, 0, true);
        assert_eq!(
            msix.raise(0).map(|message| message.address),
            Some(0xfee1_6000)
        );
        program(&mut msix, 0, 0xfee1_6000, 0x31, true);
        assert_eq!(msix.raise(0), None);
    }

    #[test]
    fn a_message_that_waits_does_not_go_out_while_its_entry_is_being_written() {
        let mut msix = Msix::new(1);
        msix.set_control(ON, |_| {});
        assert_eq!(msix.raise(0), None);
        // The address comes first, when the data is still 0.
        msix.write_table(0, &0xfee0_1000u32.to_le_bytes(), |sent| panic!("{sent:?}"));
        msix.write_table(8, &0x41u32.to_le_bytes(), |sent| panic!("{sent:?}"));
        let mut sent = Vec::new();
        msix.write_table(12, &[0], |message| sent.push(message.data));
        assert_eq!(sent, [0x41]);
    }

    #[test]
    fn an_event_that_waited_for_the_function_mask_goes_out_with_it() {
        let mut msix = Msix::new(1);
        msix.set_control(HELD, |_| {});
        program(&mut msix, 0, 0xfee1_6000, 0, true);
        assert_eq!(msix.raise(0), None);
        let mut sent = 0;
        msix.set_control(ON, |_| sent += 1);
        assert_eq!(sent, 1);
    }

    #[test]
    fn vectors_are_masked_after_a_reset_and_a_masked_one_waits() {
        let mut msix = Msix::new(70);
        msix.set_control(ON, |_| panic!("nothing was pending"));
        assert_eq!(msix.raise(65), None);
        let mut bits = [0; 2];
        msix.read_pending(8, &mut bits);
        assert_eq!(bits, [0b10, 0]);
        let sent = program(&mut msix, 65, 0x10, 7, false);
        assert_eq!(
            sent,
            [Message {
                address: 0x10,
                data: 7
            }]
        );
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn the_function_mask_holds_all_vectors_back() {
        let mut msix = Msix::new(2);
        msix.set_control(HELD, |_| panic!("nothing was pending"));
        program(&mut msix, 0, 4, 1, false);
        program(&mut msix, 1, 4, 2, true);
        assert_eq!((msix.raise(0), msix.raise(1)), (None, None));
        assert_eq!(pending(&msix), 0b11);
        let mut sent = Vec::new();
        msix.set_control(ON, |message| sent.push(message.data));
        assert_eq!(sent, [1], "the other one has a mask of its own");
        assert_eq!(pending(&msix), 0b10);
    }

    #[test]
    fn a_function_without_msix_or_such_a_vector_sends_nothing() {
        let mut msix = Msix::new(1);
        program(&mut msix, 0, 4, 1, false);
        assert_eq!(msix.raise(0), None);
        msix.set_control(ON, |_| panic!("nothing was pending"));
        assert_eq!(msix.raise(1), None);
        assert_eq!(msix.raise(0xffff), None);
    }

    #[test]
    fn reserved_bits_read_as_zero_and_accesses_behind_the_table_do_nothing() {
        let mut msix = Msix::new(1);
        msix.write_table(0, &[0xff; 64], |_| panic!("nothing was pending"));
        let mut table = [0xaa; 24];
        msix.read_table(0, &mut table);
        assert_eq!(table[0], 0xfc);
        assert_eq!(table[12..16], [1, 0, 0, 0]);
        assert_eq!(table[16..], [0; 8]);
        msix.write_table(u64::MAX, &[1, 2], |_| panic!("nothing was pending"));
        msix.read_table(u64::MAX, &mut table);
    }

    proptest! {
        #[test]
        fn a_write_to_the_table_in_pieces_is_the_same_as_in_one(
            offset in 0u64..64, data in prop::collection::vec(any::<u8>(), 1..9), cut in 0usize..9,
        ) {
            let mut whole = Msix::new(3);
            let mut pieces = whole.clone();
            whole.write_table(offset, &data, |_| ());
            let (head, tail) = data.split_at(cut.min(data.len()));
            pieces.write_table(offset, head, |_| ());
            pieces.write_table(offset + head.len() as u64, tail, |_| ());
            prop_assert_eq!(whole, pieces);
        }
    }
}
