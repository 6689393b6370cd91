//! Device classes in words.

/// What a class code says of a device, as lspci says it: by its subclass where that is a usual one, otherwise by its base class.
///
/// `class` has 24 bits: base class, subclass, programming interface (PCI Code and ID Assignment Specification, section 1).
pub fn name(class: u32) -> &'static str {
    let (base, sub) = ((class >> 16) & 0xff, (class >> 8) & 0xff);
    let by_sub = SUBCLASSES
        .iter()
        .find(|entry| (entry.0, entry.1) == (base, sub));
    let by_base = || BASE_CLASSES.iter().find(|entry| entry.0 == base);
    by_sub
        .map(|entry| entry.2)
        .or_else(|| by_base().map(|entry| entry.1))
        .unwrap_or("Device of an unknown class")
}

const BASE_CLASSES: &[(u32, &str)] = &[
    (0x00, "Unclassified device"),
    (0x01, "Mass storage controller"),
    (0x02, "Network controller"),
    (0x03, "Display controller"),
    (0x04, "Multimedia controller"),
    (0x05, "Memory controller"),
    (0x06, "Bridge"),
    (0x07, "Communication controller"),
    (0x08, "System peripheral"),
    (0x09, "Input device controller"),
    (0x0a, "Docking station"),
    (0x0b, "Processor"),
    (0x0c, "Serial bus controller"),
    (0x0d, "Wireless controller"),
    (0x0e, "Intelligent controller"),
    (0x0f, "Satellite communications controller"),
    (0x10, "Encryption controller"),
    (0x11, "Signal processing controller"),
    (0x12, "Processing accelerator"),
    (0x13, "Instrumentation"),
    (0xff, "Unassigned class"),
];

const SUBCLASSES: &[(u32, u32, &str)] = &[
    (0x01, 0x00, "SCSI storage controller"),
    (0x01, 0x01, "IDE interface"),
    (0x01, 0x04, "RAID bus controller"),
    (0x01, 0x06, "SATA controller"),
    (0x01, 0x07, "Serial Attached SCSI controller"),
    (0x01, 0x08, "Non-Volatile memory controller"),
    (0x02, 0x00, "Ethernet controller"),
    (0x02, 0x07, "Infiniband controller"),
    (0x03, 0x00, "VGA compatible controller"),
    (0x03, 0x02, "3D controller"),
    (0x04, 0x00, "Multimedia video controller"),
    (0x04, 0x01, "Multimedia audio controller"),
    (0x04, 0x03, "Audio device"),
    (0x05, 0x00, "RAM memory"),
    (0x06, 0x00, "Host bridge"),
    (0x06, 0x01, "ISA bridge"),
    (0x06, 0x04, "PCI bridge"),
    (0x07, 0x00, "Serial controller"),
    (0x08, 0x06, "IOMMU"),
    (0x0b, 0x40, "Co-processor"),
    (0x0c, 0x00, "FireWire (IEEE 1394)"),
    (0x0c, 0x03, "USB controller"),
    (0x0c, 0x05, "SMBus"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_subclass_has_a_name_of_its_own() {
        assert_eq!(name(0x01_08_02), "Non-Volatile memory controller");
        assert_eq!(name(0x02_00_00), "Ethernet controller");
    }

    #[test]
    fn any_other_goes_by_its_base_class() {
        assert_eq!(name(0x02_80_00), "Network controller");
        assert_eq!(name(0x13_00_00), "Instrumentation");
        assert_eq!(name(0x77_00_00), "Device of an unknown class");
    }

    #[test]
    fn no_class_is_named_twice() {
        let mut seen = std::collections::BTreeSet::new();
        assert!(
            BASE_CLASSES
                .iter()
                .all(|(base, _)| seen.insert((*base, None)))
        );
        assert!(
            SUBCLASSES
                .iter()
                .all(|(base, sub, _)| seen.insert((*base, Some(*sub))))
        );
    }
}
