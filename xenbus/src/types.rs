//! Checked newtypes for the numbers that Xen hands out.

use std::fmt;
use std::str::FromStr;

/// A number from xenstore that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what}")]
pub struct ParseNumberError {
    /// What was expected, in words.
    pub what: &'static str,
    /// What was found; its beginning, if it is long. A guest may have chosen it.
    pub text: String,
}

/// Reads plain decimal digits: no sign, no blanks, as xenstore holds numbers.
pub(crate) fn parse_decimal<N: FromStr>(
    text: &str,
    what: &'static str,
) -> Result<N, ParseNumberError> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = if plain { text.parse().ok() } else { None };
    number.ok_or_else(|| ParseNumberError {
        what,
        text: text.chars().take(32).collect(),
    })
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($repr:ty), $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $repr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = ParseNumberError;

            /// Reads plain decimal digits: no sign, no blanks, as xenstore holds it.
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                parse_decimal(text, $what).map($name)
            }
        }
    };
}

number!(
    /// A domain's number (`domid_t`, Xen `xen.h`).
    DomId(u16), "domain id"
);
number!(
    /// A grant reference (`grant_ref_t`, Xen `grant_table.h`).
    GrantRef(u32), "grant reference"
);
number!(
    /// An event channel port (`evtchn_port_t`, Xen `event_channel.h`): the remote domain's, or our
    /// own, as the context says.
    Port(u32), "event channel port"
);
number!(
    /// A physical interrupt as a domain numbers it (Xen `physdev.h`). Belongs to one domain.
    Pirq(u32), "PIRQ"
);
number!(
    /// A global system interrupt: an I/O APIC's input line.
    Gsi(u32), "GSI"
);

impl DomId {
    /// The control domain.
    pub const DOM0: Self = Self(0);
    /// `DOMID_IO`: owns what no domain may touch; a device assigned to it is quarantined (Xen
    /// `xen.h`).
    pub const IO: Self = Self(0x7ff1);
    /// The first number that is not a domain's (`DOMID_FIRST_RESERVED`, Xen `xen.h`).
    pub const FIRST_RESERVED: Self = Self(0x7ff0);
}

/// A PCI function as hypercalls name it. Shape: segment 16 bits, bus 8 bits, device 5 bits and
/// function 3 bits in one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciDevice {
    /// PCI segment (Linux: domain).
    pub segment: u16,
    /// Bus number.
    pub bus: u8,
    /// Device in bits 7:3, function in bits 2:0.
    pub devfn: u8,
}

impl PciDevice {
    /// `machine_sbdf` of the domctls: segment in bits 31:16, bus in 15:8, devfn in 7:0.
    pub fn sbdf(self) -> u32 {
        u32::from(self.segment) << 16 | u32::from(self.bus) << 8 | u32::from(self.devfn)
    }
}

impl FromStr for PciDevice {
    type Err = ParseNumberError;

    /// Reads `segment:bus:device.function` in hexadecimal digits, as it is displayed.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (segment, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (slot, function) = rest.split_once('.')?;
            let slot = u8::from_str_radix(slot, 16).ok()?;
            let function = u8::from_str_radix(function, 16).ok()?;
            Some(Self {
                segment: u16::from_str_radix(segment, 16).ok()?,
                bus: u8::from_str_radix(bus, 16).ok()?,
                devfn: (slot < 32 && function < 8).then_some(slot << 3 | function)?,
            })
        };
        parse().ok_or_else(|| ParseNumberError {
            what: "PCI address",
            text: text.chars().take(32).collect(),
        })
    }
}

impl fmt::Display for PciDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.segment,
            self.bus,
            self.devfn >> 3,
            self.devfn & 7
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_plain_decimal_digits() {
        assert_eq!("17".parse::<Port>().unwrap(), Port(17));
        for text in ["", "-1", "+1", " 1", "1 ", "0x1", "4294967296"] {
            assert!(text.parse::<Port>().is_err(), "{text:?}");
        }
        assert!("65536".parse::<DomId>().is_err());
    }

    #[test]
    fn a_device_is_encoded_as_the_domctls_want_it() {
        let device = PciDevice {
            segment: 1,
            bus: 3,
            devfn: 0x0a,
        };
        assert_eq!(device.sbdf(), 0x0001_030a);
        assert_eq!(device.to_string(), "0001:03:01.2");
        assert_eq!("0001:03:01.2".parse(), Ok(device));
        for text in ["", "03:01.2", "0001:03:20.0", "0001:03:1.8", "10000:0:0.0"] {
            assert!(text.parse::<PciDevice>().is_err(), "{text}");
        }
    }
}
