//! Device addresses: segment (PCI domain), bus, device, function.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

/// The address of one PCI function, physical or virtual. Orders by segment, bus, device, function.
///
/// Written `0000:03:00.0`, in hexadecimal (see [`Bdf::vdev`] for the form in the xenstore node
/// `vdev-N`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bdf {
    segment: u16,
    bus: u8,
    devfn: u8,
}

impl Bdf {
    /// The largest device number on a bus.
    pub const MAX_DEVICE: u8 = 31;
    /// The largest function number of a device.
    pub const MAX_FUNCTION: u8 = 7;

    /// The address with these parts; `None` if `device` exceeds 31 or `function` exceeds 7.
    pub const fn new(segment: u16, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > Self::MAX_DEVICE || function > Self::MAX_FUNCTION {
            return None;
        }
        Some(Self {
            segment,
            bus,
            devfn: (device << 3) | function,
        })
    }

    /// The address with `devfn` = device << 3 | function.
    pub const fn from_devfn(segment: u16, bus: u8, devfn: u8) -> Self {
        Self {
            segment,
            bus,
            devfn,
        }
    }

    /// Segment, which Linux and Xen call domain.
    pub const fn segment(self) -> u16 {
        self.segment
    }

    /// Bus.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// Device, below 32.
    pub const fn device(self) -> u8 {
        self.devfn >> 3
    }

    /// Function, below 8.
    pub const fn function(self) -> u8 {
        self.devfn & Self::MAX_FUNCTION
    }

    /// Device << 3 | function.
    pub const fn devfn(self) -> u8 {
        self.devfn
    }

    /// The same device with another function; `None` if `function` exceeds 7.
    pub const fn with_function(self, function: u8) -> Option<Self> {
        Self::new(self.segment, self.bus, self.device(), function)
    }

    /// Whether both are functions of one device.
    pub const fn same_device(self, other: Self) -> bool {
        self.segment == other.segment && self.bus == other.bus && self.device() == other.device()
    }

    /// Formats as the backend's xenstore node `vdev-N` has it: `%04x:%02x:%02x.%02x`, the function
    /// with two digits. The PV interface has frozen that.
    pub const fn vdev(self) -> Vdev {
        Vdev(self)
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.segment,
            self.bus,
            self.device(),
            self.function()
        )
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Formatter of [`Bdf::vdev`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vdev(Bdf);

impl fmt::Display for Vdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:02x}",
            self.0.segment,
            self.0.bus,
            self.0.device(),
            self.0.function()
        )
    }
}

/// Why a text is not a device address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ParseBdfError {
    /// The parts are not where they should be.
    #[error("expected dddd:bb:ss.f or bb:ss.f in hexadecimal, for example 0000:03:00.0")]
    Form,
    /// Segment has no hexadecimal digits, others, or too many.
    #[error(
        "the segment must be 0 to ffff in hexadecimal; Xen knows no others, as those behind Intel's VMD are"
    )]
    Segment,
    /// Bus has no hexadecimal digits, others, or too many.
    #[error("the bus must be 0 to ff in hexadecimal")]
    Bus,
    /// Device has no hexadecimal digits, others, or is too large.
    #[error("the device must be 0 to 1f in hexadecimal")]
    Device,
    /// Function has no digits, others, or is too large.
    #[error("the function must be 0 to 7")]
    Function,
}

/// Parses 1 to `max_digits` hexadecimal digits; unlike `from_str_radix`, takes no sign.
pub(crate) fn hex(text: &str, max_digits: usize) -> Option<u16> {
    if text.len() > max_digits || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u16::from_str_radix(text, 16).ok()
}

pub(crate) fn parse_segment(text: &str) -> Result<u16, ParseBdfError> {
    hex(text, 4).ok_or(ParseBdfError::Segment)
}

pub(crate) fn parse_bus(text: &str) -> Result<u8, ParseBdfError> {
    hex(text, 2)
        .and_then(|bus| u8::try_from(bus).ok())
        .ok_or(ParseBdfError::Bus)
}

pub(crate) fn parse_device(text: &str) -> Result<u8, ParseBdfError> {
    let device = hex(text, 2).and_then(|device| u8::try_from(device).ok());
    device
        .filter(|device| *device <= Bdf::MAX_DEVICE)
        .ok_or(ParseBdfError::Device)
}

pub(crate) fn parse_function(text: &str) -> Result<u8, ParseBdfError> {
    let function = hex(text, 2).and_then(|function| u8::try_from(function).ok());
    function
        .filter(|function| *function <= Bdf::MAX_FUNCTION)
        .ok_or(ParseBdfError::Function)
}

/// Accepts `dddd:bb:ss.f` and `bb:ss.f` (segment 0), each part with or without leading zeros, so
/// also what [`Bdf::vdev`] writes.
impl FromStr for Bdf {
    type Err = ParseBdfError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, function) = text.split_once('.').ok_or(ParseBdfError::Form)?;
        let (buses, device) = address.rsplit_once(':').ok_or(ParseBdfError::Form)?;
        let (segment, bus) = buses.rsplit_once(':').unwrap_or(("0", buses));
        if segment.contains(':') {
            return Err(ParseBdfError::Form);
        }
        let (segment, bus) = (parse_segment(segment)?, parse_bus(bus)?);
        Self::new(
            segment,
            bus,
            parse_device(device)?,
            parse_function(function)?,
        )
        .ok_or(ParseBdfError::Form)
    }
}

impl Serialize for Bdf {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bdf {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl de::Visitor<'_> for Text {
            type Value = Bdf;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a device address such as \"0000:03:00.0\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bdf, E> {
                text.parse().map_err(|error| {
                    E::custom(format_args!("{text:?} is no device address: {error}"))
                })
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_and_function_numbers_beyond_the_bus_are_no_address() {
        assert!(Bdf::new(0, 0, 32, 0).is_none());
        assert!(Bdf::new(0, 0, 0, 8).is_none());
        assert!(Bdf::new(0xffff, 0xff, 31, 7).is_some());
    }

    #[test]
    fn displays_as_the_toolstack_writes_it() {
        let bdf = Bdf::new(0, 0x3, 0x1f, 7).unwrap();
        assert_eq!(bdf.to_string(), "0000:03:1f.7");
        assert_eq!(bdf.vdev().to_string(), "0000:03:1f.07");
        assert_eq!(bdf.devfn(), 0xff);
    }

    #[test]
    fn parses_with_and_without_segment_and_leading_zeros() {
        let bdf = Bdf::new(0, 3, 0, 1).unwrap();
        for text in [
            "0000:03:00.1",
            "03:00.1",
            "3:0.1",
            "0:3:0.1",
            "0000:03:00.01",
        ] {
            assert_eq!(text.parse(), Ok(bdf), "{text}");
        }
        assert_eq!(
            "AbCd:fE:1F.7".parse(),
            Ok(Bdf::new(0xabcd, 0xfe, 0x1f, 7).unwrap())
        );
    }

    #[test]
    fn names_the_part_that_is_wrong() {
        for (text, error) in [
            ("", ParseBdfError::Form),
            ("03:00", ParseBdfError::Form),
            ("00.0", ParseBdfError::Form),
            ("0:0:0:0.0", ParseBdfError::Form),
            ("10000:03:00.0", ParseBdfError::Segment),
            (":03:00.0", ParseBdfError::Segment),
            ("100:00.0", ParseBdfError::Bus),
            ("+3:00.0", ParseBdfError::Bus),
            ("03:20.0", ParseBdfError::Device),
            ("03:.0", ParseBdfError::Device),
            ("03:00.8", ParseBdfError::Function),
            ("03:00.", ParseBdfError::Function),
            ("03:00.0.0", ParseBdfError::Function),
            ("03:00.0 ", ParseBdfError::Function),
        ] {
            assert_eq!(text.parse::<Bdf>(), Err(error), "{text:?}");
        }
    }

    #[test]
    fn orders_by_segment_then_bus_then_device_then_function() {
        let parse = |text: &str| text.parse::<Bdf>().unwrap();
        let ordered = [
            "0000:00:00.1",
            "0000:00:01.0",
            "0000:01:00.0",
            "0001:00:00.0",
        ]
        .map(parse);
        assert!(ordered.is_sorted());
    }

    #[test]
    fn is_a_string_in_files() {
        struct Shown(Bdf);
        impl fmt::Display for Shown {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.serialize(f)
            }
        }
        let bdf = Bdf::new(0, 3, 0, 1).unwrap();
        assert_eq!(Shown(bdf).to_string(), "0000:03:00.1");
        let read = |text: &'static str| -> Result<Bdf, de::value::Error> {
            Bdf::deserialize(de::IntoDeserializer::into_deserializer(text))
        };
        assert_eq!(read("03:00.1"), Ok(bdf));
        assert_eq!(
            read("03:00.9").unwrap_err().to_string(),
            "\"03:00.9\" is no device address: the function must be 0 to 7"
        );
    }
}
