//! The ACPI table that tells a guest where its slots of virtio-mmio are. xl passes it on (`acpi_firmware=`), and
//! hvmloader adds it to its own tables as it is.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, Interrupt, Memory32Fixed, Name, Path, ResourceTemplate, Scope};
use acpi_tables::sdt::Sdt;
use pcibackd::config::MmioSlot;
use pcibackd::virtual_devices::mmio;

/// Bytes of a table's header (ACPI 6.5, section 5.2.6).
const HEADER: u32 = 36;

/// What drivers of virtio-mmio know it by.
const HARDWARE_ID: &str = "LNRO0005";

/// The table, with a device for each slot. A slot that holds none is one that the driver leaves alone.
pub fn build() -> Vec<u8> {
    let mut devices = Vec::new();
    for slot in MmioSlot::all() {
        let memory = Memory32Fixed::new(true, mmio::address(slot), mmio::LENGTH);
        // As those of PCI, for they share it: level, active low.
        let interrupt = Interrupt::new(true, false, true, true, mmio::line(slot).gsi());
        let resources = ResourceTemplate::new(vec![&memory, &interrupt]);
        let number = slot.number();
        let children = [
            Name::new("_HID".into(), &HARDWARE_ID),
            Name::new("_UID".into(), &number),
            Name::new("_CRS".into(), &resources),
        ];
        let name = Path::new(&format!("VIO{number:X}"));
        let children = children.iter().map(|child| child as &dyn Aml).collect();
        Device::new(name, children).to_aml_bytes(&mut devices);
    }
    let mut table = Sdt::new(*b"SSDT", HEADER, 2, *b"PCIBCK", *b"VIRTMMIO", 1);
    table.append_slice(&Scope::raw("\\_SB_".into(), devices));
    table.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is left to decode of a table.
    struct Bytes<'a>(&'a [u8]);

    impl<'a> Bytes<'a> {
        fn take(&mut self, count: usize) -> &'a [u8] {
            let (taken, rest) = self.0.split_at(count);
            self.0 = rest;
            taken
        }

        fn expect(&mut self, bytes: &[u8]) {
            assert_eq!(self.take(bytes.len()), bytes);
        }

        /// What a PkgLength (ACPI 6.5, section 20.2.4) spans, without itself.
        fn package(&mut self) -> Self {
            let lead = usize::from(self.0[0]);
            let more = lead >> 6;
            let tail = self.0[1..=more].iter().rev();
            let high = tail.fold(0, |length, byte| length << 8 | usize::from(*byte));
            let length = match more {
                0 => lead & 0x3f,
                _ => high << 4 | lead & 0xf,
            };
            self.take(1 + more);
            Self(self.take(length - 1 - more))
        }

        fn word(&mut self) -> u32 {
            u32::from_le_bytes(self.take(4).try_into().unwrap())
        }
    }

    #[test]
    fn the_table_has_each_slot_with_its_memory_and_its_line() {
        let table = build();
        let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
        let mut header = Bytes(&table);
        header.expect(b"SSDT");
        assert_eq!(header.word() as usize, table.len());
        let mut body = Bytes(&table[36..]);
        body.expect(&[0x10]);
        let mut scope = body.package();
        assert!(body.0.is_empty());
        scope.expect(b"\\_SB_");
        for number in 0..7u8 {
            scope.expect(&[0x5b, 0x82]);
            let mut device = scope.package();
            device.expect(&[b'V', b'I', b'O', b'0' + number]);
            device.expect(b"\x08_HID\x0dLNRO0005\0");
            device.expect(b"\x08_UID");
            // ZeroOp, OneOp, or BytePrefix.
            let integer = [0x0a, number];
            device.expect(if number < 2 { &integer[1..] } else { &integer });
            device.expect(b"\x08_CRS\x11");
            let mut buffer = device.package();
            assert!(device.0.is_empty());
            buffer.expect(&[0x0a]);
            assert_eq!(usize::from(buffer.take(1)[0]), buffer.0.len());
            // Memory32Fixed, which can be written.
            buffer.expect(&[0x86, 9, 0, 1]);
            assert_eq!(buffer.word(), 0xfe70_0000 + 0x200 * u32::from(number));
            assert_eq!(buffer.word(), 0x200);
            // Interrupt: shared, active low, level, consumer.
            buffer.expect(&[0x89, 6, 0, 0b1101, 1]);
            assert_eq!(buffer.word(), 16 + u32::from(number));
            buffer.expect(&[0x79, 0]);
            assert!(buffer.0.is_empty());
        }
        assert!(scope.0.is_empty());
    }
}
