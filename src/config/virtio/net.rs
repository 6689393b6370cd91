//! Network cards.

use std::fmt;
use std::num::NonZeroU8;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Table", into = "Table")]
pub struct Card {
    /// Where its packets go.
    pub link: CardLink,
    /// Its address; `None`: one that is always the same for this guest and slot.
    pub mac: Option<Mac>,
    /// How many pairs of queues.
    pub queues: NonZeroU8,
    /// Checksums and segmentation are left to the host.
    pub offloads: bool,
}

/// Where a card's packets go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CardLink {
    /// A tap that is there already.
    Tap(Interface),
    /// A tap of ours, in this bridge of the host's. It is there for as long as the daemon serves the guest.
    Bridge(Interface),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tap: Option<Interface>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bridge: Option<Interface>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<Mac>,
    #[serde(default = "super::one")]
    queues: NonZeroU8,
    #[serde(default = "yes")]
    offloads: bool,
}

fn yes() -> bool {
    true
}

impl TryFrom<Table> for Card {
    type Error = &'static str;

    fn try_from(table: Table) -> Result<Self, &'static str> {
        let link = match (table.tap, table.bridge) {
            (Some(tap), None) => CardLink::Tap(tap),
            (None, Some(bridge)) => CardLink::Bridge(bridge),
            _ => {
                return Err(
                    "a net device needs one of two keys: bridge, in which it is to be, or tap, which you have made for it",
                );
            }
        };
        Ok(Self {
            link,
            mac: table.mac,
            queues: table.queues,
            offloads: table.offloads,
        })
    }
}

impl From<Card> for Table {
    fn from(card: Card) -> Self {
        let (tap, bridge) = match card.link {
            CardLink::Tap(tap) => (Some(tap), None),
            CardLink::Bridge(bridge) => (None, Some(bridge)),
        };
        Self {
            tap,
            bridge,
            mac: card.mac,
            queues: card.queues,
            offloads: card.offloads,
        }
    }
}

/// The name of a network device of the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Interface(String);

impl Interface {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Interface {
    type Error = &'static str;

    /// What Linux takes (`dev_valid_name`), without what `ip` would take for an option or a pattern.
    fn try_from(name: String) -> Result<Self, &'static str> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let begins_well = name.starts_with(|first: char| first.is_ascii_alphanumeric());
        if !begins_well || name.len() >= libc::IFNAMSIZ || !name.bytes().all(plain) {
            return Err("a network device has a name of 1 to 15 letters, digits and ._-");
        }
        Ok(Self(name))
    }
}

impl From<Interface> for String {
    fn from(name: Interface) -> Self {
        name.0
    }
}

/// A card's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl Mac {
    /// Xen's prefix, and after it what tells this card from the others: 23 bits are for everybody's use, the other half is given out.
    const PREFIX: [u8; 3] = [0x00, 0x16, 0x3e];

    /// An address that is always the same for the same words: FNV-1a, for it has to be the same in every version.
    pub fn derived(words: &[&str]) -> Self {
        const BASIS: u32 = 0x811c_9dc5;
        const PRIME: u32 = 0x0100_0193;
        // Of each word its end, too, so that no two lists are alike.
        let bytes = words.iter().flat_map(|word| word.bytes().chain([0]));
        let hash = bytes.fold(BASIS, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(PRIME)
        });
        let [a, b, c] = Self::PREFIX;
        let [d, e, f, g] = hash.to_be_bytes();
        Self([a, b, c, (d ^ e) & 0x7f, f, g])
    }

    /// In the order in which they are sent.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        const FORM: &str = "a card's address is six bytes, as in 00:16:3e:01:02:03, and no group's: the first is even";
        let mut mac = [0; 6];
        let mut words = text.split(':');
        for byte in &mut mac {
            let hexadecimal = |word: &&str| {
                word.len() == 2 && word.bytes().all(|digit| digit.is_ascii_hexdigit())
            };
            let word = words.next().filter(hexadecimal).ok_or(FORM)?;
            *byte = u8::from_str_radix(word, 16).map_err(|_| FORM)?;
        }
        let [first, ..] = mac;
        if words.next().is_some() || first & 1 != 0 || mac == [0; 6] {
            return Err(FORM);
        }
        Ok(Self(mac))
    }
}

impl TryFrom<String> for Mac {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_six_bytes_and_no_group_s() {
        let mac: Mac = "00:16:3E:01:02:ff".parse().unwrap();
        assert_eq!(mac.bytes(), [0, 0x16, 0x3e, 1, 2, 0xff]);
        assert_eq!(mac.to_string(), "00:16:3e:01:02:ff");
        for text in [
            "",
            "00:16:3e:01:02",
            "00:16:3e:01:02:03:04",
            "01:16:3e:01:02:03",
            "00:00:00:00:00:00",
            "0:16:3e:01:02:03",
            "+0:16:3e:01:02:03",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_address_that_is_made_stays_the_same_and_is_another_s_no_more() {
        let made = Mac::derived(&["host", "web", "1f"]);
        assert_eq!(made, Mac::derived(&["host", "web", "1f"]));
        let [a, b, c, d, ..] = made.bytes();
        assert_eq!(([a, b, c], d & 0x80), (Mac::PREFIX, 0));
        for words in [
            ["host", "web", "1e"],
            ["host", "we", "b1f"],
            ["h", "ostweb", "1f"],
        ] {
            assert_ne!(made, Mac::derived(&words));
        }
    }

    #[test]
    fn names_of_network_devices_are_such_as_ip_takes() {
        let taken = |name: &str| Interface::try_from(name.to_owned()).is_ok();
        assert!(
            ["xenbr0", "vif5.0-emu", "br_1"]
                .iter()
                .all(|name| taken(name))
        );
        assert!(
            !["", "a/b", "a b", "-br", "..", "tap%d", "sixteen-letters-"]
                .iter()
                .any(|name| taken(name))
        );
    }
}
