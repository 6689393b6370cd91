//! What an operator opens beyond the rules: ranges and quirks.

use conf_space::Width;
use conf_space::overlay::{
    Effect, Field, Permissive, Policy, QuirkRefusal, Quirks, Ranges, Treatment,
};
use proptest::prelude::*;

use crate::device::{self, EXPRESS, MSI, PM};
use crate::{Guest, ORDINARY, guest};

const DEVICE_CONTROL: u16 = EXPRESS + 8;
const DEVICE_STATUS: u16 = EXPRESS + 10;

fn ranges(list: &[&str]) -> Policy {
    let mut ranges = Ranges::EMPTY;
    for range in list {
        ranges.insert(range.parse().unwrap()).unwrap();
    }
    Policy {
        permissive: Permissive::Ranges(ranges),
        allow_interrupt_control: false,
    }
}

fn quirks(list: &[String]) -> Quirks {
    let mut quirks = Quirks::EMPTY;
    for quirk in list {
        quirks.insert(quirk.parse().unwrap()).unwrap();
    }
    quirks
}

fn guest_with_quirks(list: &[String]) -> Guest<conf_space::memory::MemorySpace> {
    let mut guest = guest(ORDINARY);
    guest.overlay.set_quirks(&quirks(list));
    guest
}

#[test]
fn a_range_opens_the_writes_that_are_wholly_within_it() {
    let range = format!("{DEVICE_CONTROL}..{DEVICE_STATUS}");
    let mut guest = guest(ranges(&[&range]));
    assert_eq!(guest.write(DEVICE_CONTROL, 2, 0x5936), Effect::default());
    assert_eq!(
        guest.device.writes(),
        [(DEVICE_CONTROL, Width::Two, 0x5936)]
    );
    for (offset, size) in [(DEVICE_CONTROL, 4), (DEVICE_STATUS, 2), (EXPRESS + 4, 4)] {
        let dropped = guest.write(offset, size, 0).dropped.unwrap();
        assert_eq!(dropped.offset, offset);
    }
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn a_range_opens_no_register_that_has_a_rule() {
    let mut guest = guest(ranges(&["0..0x1000"]));
    for (offset, size) in [(0x00, 2), (PM, 1), (0x3c, 1)] {
        guest.write(offset, size, u32::MAX);
    }
    assert_eq!(guest.device.writes(), []);
    assert!(guest.try_write(MSI + 2, 2, 0x0081).is_err());
}

#[test]
fn of_a_quirks_register_the_guest_writes_the_bits_in_the_mask() {
    let mut guest = guest_with_quirks(&[format!("{DEVICE_CONTROL:x}:2:00e0")]);
    guest.device.space.set(DEVICE_CONTROL, Width::Two, 0x2810);
    assert_eq!(guest.write(DEVICE_CONTROL, 2, 0xffff), Effect::default());
    assert_eq!(
        guest.device.writes(),
        [(DEVICE_CONTROL, Width::Two, 0x28f0)]
    );
    // A part of it as well; the part that is not written keeps what it has.
    guest.device.space.set(DEVICE_CONTROL, Width::Two, 0x2850);
    guest.write(DEVICE_CONTROL, 1, 0x00);
    assert_eq!(
        guest.device.writes(),
        [(DEVICE_CONTROL, Width::Two, 0x2810)]
    );
    guest.write(DEVICE_CONTROL + 1, 1, 0xff);
    assert_eq!(
        guest.device.writes(),
        [(DEVICE_CONTROL, Width::Two, 0x2810)]
    );
}

#[test]
fn status_bits_beside_a_quirk_are_not_cleared_by_being_written_as_read() {
    let mut guest = guest_with_quirks(&[format!("{DEVICE_CONTROL:x}:4:000000e0")]);
    guest.device.space.set(DEVICE_CONTROL, Width::Two, 0x2810);
    guest.device.space.set(DEVICE_STATUS, Width::Two, 0x000f);
    guest.write(DEVICE_CONTROL, 4, 0x0000_0020);
    assert_eq!(guest.hardware(DEVICE_STATUS, Width::Two), 0x000f);
    assert_eq!(guest.hardware(DEVICE_CONTROL, Width::Two), 0x2830);
    // In the mask they are the guest's to clear.
    guest
        .overlay
        .set_quirks(&quirks(&[format!("{DEVICE_CONTROL:x}:4:000f0000")]));
    guest.write(DEVICE_CONTROL, 4, 0x0003_0000);
    assert_eq!(guest.hardware(DEVICE_STATUS, Width::Two), 0x000c);
    assert_eq!(guest.hardware(DEVICE_CONTROL, Width::Two), 0x2830);
}

#[test]
fn no_quirk_changes_a_rule_or_lies_beyond_the_space() {
    let mut identity = device::identity();
    identity.config_size = conf_space::ConfigSize::Conventional;
    let mut guest = Guest::of(&identity, device::nic(), ORDINARY);
    let list = ["4:2:ffff", "10:4:ffffffff", "0:4:ffffffff", "104:4:1"].map(str::to_owned);
    let refusals: Vec<_> = quirks(&list)
        .iter()
        .map(|quirk| guest.overlay.refuses(quirk).unwrap())
        .collect();
    assert!(matches!(
        refusals.as_slice(),
        [
            QuirkRefusal::Ruled { name: "Command" },
            QuirkRefusal::Ruled { name: "BAR 0" },
            QuirkRefusal::Ruled { name: "Vendor ID" },
            QuirkRefusal::Beyond { size: 256 },
        ]
    ));
    guest.overlay.set_quirks(&quirks(&list));
    guest.write(0x10, 4, 0xdead_0000);
    assert!(
        guest
            .device
            .writes()
            .iter()
            .all(|write| write.0 != 0x10 || write.2 != 0xdead_0000)
    );
}

#[test]
fn quirks_that_are_taken_back_leave_nothing_behind() {
    let mut guest = guest_with_quirks(&[format!("{DEVICE_CONTROL:x}:2:ffff"), "104:4:1".into()]);
    assert_eq!(guest.write(0x104, 4, 1), Effect::default());
    guest.overlay.set_quirks(&Quirks::EMPTY);
    assert!(guest.write(0x104, 4, 1).dropped.is_some());
    assert!(guest.write(DEVICE_CONTROL, 2, 1).dropped.is_some());
}

#[test]
fn the_listing_shows_what_a_quirk_opens() {
    let guest = guest_with_quirks(&[
        format!("{DEVICE_CONTROL:x}:2:00e0"),
        "104:4:1".into(),
        "f1:1:ff".into(),
    ]);
    let fields: Vec<Field> = guest.overlay.fields().collect();
    let mut next = 0;
    for field in &fields {
        assert_eq!(field.offset, next);
        next += field.length;
    }
    for (offset, name) in [
        (DEVICE_CONTROL, "Device Control"),
        (0x104, "quirk"),
        (0xf1, "quirk"),
    ] {
        let field = fields.iter().find(|field| field.offset == offset).unwrap();
        assert_eq!((field.name, field.treatment), (name, Treatment::Filtered));
    }
}

proptest! {
    /// Whatever is opened and written, bits that are in no mask and no range keep what hardware has.
    #[test]
    fn what_is_not_opened_stays(
        opened in prop::collection::vec((0x40u16..0x140, 0usize..3, any::<u32>()), 0..8),
        writes in prop::collection::vec((0x40u16..0x140, 0usize..3, any::<u32>()), 0..32),
    ) {
        const WIDTHS: [Width; 3] = [Width::One, Width::Two, Width::Four];
        let align = |offset: u16, width: Width| offset & !(width.bytes() - 1);
        let mut quirks = Quirks::EMPTY;
        let mut open = std::collections::BTreeMap::new();
        for (offset, width, mask) in opened {
            let width = WIDTHS[width];
            let quirk = conf_space::overlay::Quirk::new(align(offset, width), width, mask & width.mask()).unwrap();
            let _ = quirks.insert(quirk);
        }
        for quirk in quirks.iter() {
            for byte in 0..quirk.width().bytes() {
                *open.entry(quirk.offset() + byte).or_insert(0u8) |= (quirk.mask() >> (8 * byte)) as u8;
            }
        }
        // A space that is nothing but bits: the header alone, no capabilities.
        let mut space = conf_space::memory::MemorySpace::new(conf_space::ConfigSize::Extended);
        for offset in (0x40..0x140).step_by(4) {
            space.make_writable(offset, Width::Four, u32::MAX);
            space.set(offset, Width::Four, 0x5aa5_c33c);
        }
        let mut guest = Guest::of(&device::identity(), space, ORDINARY);
        guest.overlay.set_quirks(&quirks);
        let before: Vec<u32> = (0x40..0x140).map(|offset| guest.hardware(offset, Width::One)).collect();
        for (offset, width, value) in writes {
            let width = WIDTHS[width];
            let _ = guest.try_write(align(offset, width), i32::from(width.bytes()), value);
        }
        for (offset, before) in (0x40..0x140).zip(before) {
            let changed = guest.hardware(offset, Width::One) ^ before;
            let open = u32::from(open.get(&offset).copied().unwrap_or(0));
            prop_assert_eq!(changed & !open, 0, "{:#x}", offset);
        }
    }
}
