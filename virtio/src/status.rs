//! The device status register as a table of legal transitions (virtio 1.3, section 2.1). What a
//! write means is decided here, once, for every transport.

bitflags::bitflags! {
    /// The device status field, one byte.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Status: u8 {
        /// The guest has noticed the device.
        const ACKNOWLEDGE = 1;
        /// The guest knows how to drive it.
        const DRIVER = 1 << 1;
        /// The driver is ready: the device is live.
        const DRIVER_OK = 1 << 2;
        /// The features are agreed on. Not in the legacy interface.
        const FEATURES_OK = 1 << 3;
        /// The device cannot go on. Set by the device alone.
        const DEVICE_NEEDS_RESET = 1 << 6;
        /// The driver has given up.
        const FAILED = 1 << 7;
    }
}

/// Which interface the driver uses. It decides whether features are confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interface {
    /// As before virtio 1.0: no FEATURES_OK.
    Legacy,
    /// Virtio 1.0 and later.
    Modern,
}

/// What a write to the register amounted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// Zero was written: the transport resets the device.
    Reset,
    /// The driver has found the device, or knows how to drive it.
    Found,
    /// The driver's features are accepted and fixed.
    FeaturesAccepted,
    /// The driver's features are refused: FEATURES_OK reads back as clear, and the driver may try
    /// others.
    FeaturesRefused,
    /// The device goes live.
    Live,
    /// The driver has given up. Only a reset leads on.
    GivenUp,
    /// The value was there already.
    Unchanged,
    /// A step that the specification does not allow. The register keeps its value.
    Illegal,
}

const FOUND: Status = Status::ACKNOWLEDGE;
const DRIVEN: Status = FOUND.union(Status::DRIVER);
const AGREED: Status = DRIVEN.union(Status::FEATURES_OK);
const LIVE: Status = AGREED.union(Status::DRIVER_OK);
const LEGACY_LIVE: Status = DRIVEN.union(Status::DRIVER_OK);

/// From, to, and what it means. Firmware (SeaBIOS, iPXE) writes the first two bits at once, so that
/// is legal here.
const MODERN: &[(Status, Status, Transition)] = &[
    (Status::empty(), FOUND, Transition::Found),
    (Status::empty(), DRIVEN, Transition::Found),
    (FOUND, DRIVEN, Transition::Found),
    (DRIVEN, AGREED, Transition::FeaturesAccepted),
    (AGREED, LIVE, Transition::Live),
];
const LEGACY: &[(Status, Status, Transition)] = &[
    (Status::empty(), FOUND, Transition::Found),
    (Status::empty(), DRIVEN, Transition::Found),
    (FOUND, DRIVEN, Transition::Found),
    (DRIVEN, LEGACY_LIVE, Transition::Live),
];

/// The register. Starts as zero, which is also what a reset leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceStatus(Status);

impl Default for DeviceStatus {
    fn default() -> Self {
        Self(Status::empty())
    }
}

impl DeviceStatus {
    /// As it was before a restart.
    pub const fn restored(status: Status) -> Self {
        Self(status)
    }

    /// What the driver reads.
    pub fn get(self) -> Status {
        self.0
    }

    /// The device may use its queues: the driver is ready and nothing has failed since.
    pub fn is_live(self) -> bool {
        self.0.contains(Status::DRIVER_OK)
            && !self
                .0
                .intersects(Status::DEVICE_NEEDS_RESET | Status::FAILED)
    }

    /// A driver writes `value`. `features_acceptable` is whether the device can live with the
    /// features that the driver has chosen by now; it decides a write that sets FEATURES_OK, and
    /// nothing else.
    pub fn write(
        &mut self,
        value: u8,
        interface: Interface,
        features_acceptable: bool,
    ) -> Transition {
        if value == 0 {
            self.0 = Status::empty();
            return Transition::Reset;
        }
        let Some(mut wanted) = Status::from_bits(value) else {
            return Transition::Illegal;
        };
        // A driver writes the register back as it read it, this bit included; it has no say in it.
        wanted.remove(Status::DEVICE_NEEDS_RESET);
        let mut table = MODERN;
        if interface == Interface::Legacy {
            // Drivers of both interfaces set it everywhere; a legacy device knows no such bit.
            wanted.remove(Status::FEATURES_OK);
            table = LEGACY;
        }
        let now = self.0.difference(Status::DEVICE_NEEDS_RESET);
        if wanted == now {
            return Transition::Unchanged;
        }
        if self.0.contains(Status::FAILED) {
            return Transition::Illegal;
        }
        if wanted.contains(Status::FAILED) {
            self.0.insert(Status::FAILED);
            return Transition::GivenUp;
        }
        if self.0.contains(Status::DEVICE_NEEDS_RESET) {
            return Transition::Illegal;
        }
        match table
            .iter()
            .find(|(from, to, _)| *from == now && *to == wanted)
        {
            Some((_, _, Transition::FeaturesAccepted)) if !features_acceptable => {
                Transition::FeaturesRefused
            }
            Some((_, to, meaning)) => {
                self.0 = *to;
                *meaning
            }
            None => Transition::Illegal,
        }
    }

    /// The device cannot go on. Returns whether the driver is to be told by a configuration change
    /// interrupt, which it is from DRIVER_OK on.
    pub fn set_needs_reset(&mut self) -> bool {
        self.0.insert(Status::DEVICE_NEEDS_RESET);
        self.0.contains(Status::DRIVER_OK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Interface::{Legacy, Modern};

    fn after(interface: Interface, writes: &[u8]) -> DeviceStatus {
        let mut status = DeviceStatus::default();
        for value in writes {
            let meaning = status.write(*value, interface, true);
            assert!(
                !matches!(meaning, Transition::Illegal),
                "{value:#x} after {:?}",
                status.get()
            );
        }
        status
    }

    #[test]
    fn a_modern_driver_goes_live_step_by_step() {
        let mut status = DeviceStatus::default();
        for (value, meaning) in [
            (1, Transition::Found),
            (3, Transition::Found),
            (0xb, Transition::FeaturesAccepted),
            (0xf, Transition::Live),
            (0xf, Transition::Unchanged),
        ] {
            assert_eq!(status.write(value, Modern, true), meaning);
            assert_eq!(status.get().bits(), value);
        }
        assert!(status.is_live());
    }

    #[test]
    fn a_legacy_driver_goes_live_without_confirming_features() {
        assert!(after(Legacy, &[1, 3, 7]).is_live());
        assert_eq!(
            DeviceStatus::default().write(7, Legacy, true),
            Transition::Illegal
        );
    }

    #[test]
    fn a_driver_that_confirms_features_on_a_legacy_device_finds_no_such_bit_and_goes_live() {
        let status = after(Legacy, &[3, 0xb, 0xf]);
        assert_eq!(status.get(), LEGACY_LIVE);
        assert!(status.is_live());
    }

    #[test]
    fn firmware_may_write_the_first_two_bits_at_once() {
        assert!(after(Modern, &[3, 0xb, 0xf]).is_live());
    }

    #[test]
    fn refused_features_read_back_as_not_agreed_and_others_may_be_tried() {
        let mut status = after(Modern, &[1, 3]);
        assert_eq!(
            status.write(0xb, Modern, false),
            Transition::FeaturesRefused
        );
        assert_eq!(status.get().bits(), 3);
        assert_eq!(
            status.write(0xb, Modern, true),
            Transition::FeaturesAccepted
        );
    }

    #[test]
    fn zero_resets_from_everywhere() {
        for writes in [&[][..], &[1], &[3], &[0xb], &[0xf], &[0x80]] {
            let mut status = DeviceStatus::default();
            for value in writes {
                status.write(*value, Modern, true);
            }
            status.set_needs_reset();
            assert_eq!(status.write(0, Modern, true), Transition::Reset);
            assert_eq!(status, DeviceStatus::default());
        }
    }

    #[test]
    fn a_driver_that_gave_up_can_only_reset() {
        let mut status = after(Modern, &[1, 3]);
        assert_eq!(status.write(0x83, Modern, true), Transition::GivenUp);
        assert_eq!(status.write(0x8b, Modern, true), Transition::Illegal);
        assert_eq!(status.write(0x03, Modern, true), Transition::Illegal);
        assert_eq!(status.write(0x83, Modern, true), Transition::Unchanged);
    }

    #[test]
    fn a_device_that_needs_a_reset_leaves_no_other_way() {
        let mut status = after(Modern, &[1, 3, 0xb]);
        assert!(
            !status.set_needs_reset(),
            "nobody listens for configuration changes yet"
        );
        assert_eq!(status.write(0x4f, Modern, true), Transition::Illegal);
        let mut live = after(Modern, &[1, 3, 0xb, 0xf]);
        assert!(live.set_needs_reset());
        assert!(!live.is_live());
        assert_eq!(live.write(0x4f, Modern, true), Transition::Unchanged);
        assert_eq!(live.write(0xcf, Modern, true), Transition::GivenUp);
    }

    #[test]
    fn a_driver_cannot_set_the_bit_that_is_the_devices() {
        let mut status = DeviceStatus::default();
        assert_eq!(status.write(0x41, Modern, true), Transition::Found);
        assert_eq!(status.get(), Status::ACKNOWLEDGE);
    }

    #[test]
    fn whatever_is_written_no_bit_but_by_reset_is_ever_cleared_and_no_step_is_skipped() {
        // Every reachable state, every value, both interfaces: the state space is small enough to
        // walk all of it.
        for interface in [Legacy, Modern] {
            let mut seen = vec![DeviceStatus::default()];
            let mut next = 0;
            while let Some(&from) = seen.get(next) {
                next += 1;
                for value in 0..=u8::MAX {
                    for acceptable in [false, true] {
                        let mut to = from;
                        let meaning = to.write(value, interface, acceptable);
                        assert!(
                            value == 0 || to.get().contains(from.get()),
                            "{from:?} {value:#x}"
                        );
                        assert_eq!(
                            from == to,
                            matches!(
                                meaning,
                                Transition::Unchanged
                                    | Transition::Illegal
                                    | Transition::FeaturesRefused
                            ) || (value == 0 && from == DeviceStatus::default())
                        );
                        let driver_ok = to.get().contains(Status::DRIVER_OK);
                        assert!(
                            !driver_ok
                                || interface == Legacy
                                || to.get().contains(Status::FEATURES_OK)
                        );
                        assert!(!driver_ok || to.get().contains(DRIVEN));
                        if !seen.contains(&to) {
                            seen.push(to);
                        }
                    }
                }
                let mut broken = from;
                broken.set_needs_reset();
                if !seen.contains(&broken) {
                    seen.push(broken);
                }
            }
            assert_eq!(
                seen.len(),
                if interface == Legacy { 16 } else { 20 },
                "{seen:?}"
            );
        }
    }
}
