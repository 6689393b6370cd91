//! The states that a frontend and a backend show each other (Xen `io/xenbus.h`).

use std::fmt;

/// `enum xenbus_state`. In xenstore: its number in decimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum XenbusState {
    /// No such node, or nothing that can be read as a state.
    Unknown = 0,
    /// Written by the toolstack.
    Initialising = 1,
    /// The backend waits for its configuration.
    InitWait = 2,
    /// Ready, waiting for the other end.
    Initialised = 3,
    /// In use.
    Connected = 4,
    /// On its way out, or (backend) failed.
    Closing = 5,
    /// Gone.
    Closed = 6,
    /// Devices are about to be added or removed.
    Reconfiguring = 7,
    /// Devices have been added or removed.
    Reconfigured = 8,
}

impl XenbusState {
    /// Reads a state as xenstore holds it. Anything that is not a state's number is
    /// [`XenbusState::Unknown`], as for every xenbus driver.
    pub fn parse(text: &[u8]) -> Self {
        match text {
            b"1" => Self::Initialising,
            b"2" => Self::InitWait,
            b"3" => Self::Initialised,
            b"4" => Self::Connected,
            b"5" => Self::Closing,
            b"6" => Self::Closed,
            b"7" => Self::Reconfiguring,
            b"8" => Self::Reconfigured,
            _ => Self::Unknown,
        }
    }

    /// The state's number.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The state's name as the header spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "Unknown",
            Self::Initialising => "Initialising",
            Self::InitWait => "InitWait",
            Self::Initialised => "Initialised",
            Self::Connected => "Connected",
            Self::Closing => "Closing",
            Self::Closed => "Closed",
            Self::Reconfiguring => "Reconfiguring",
            Self::Reconfigured => "Reconfigured",
        }
    }
}

impl fmt::Display for XenbusState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_survives_the_way_through_xenstore() {
        for number in 0..=8u8 {
            assert_eq!(
                XenbusState::parse(number.to_string().as_bytes()).number(),
                number
            );
        }
    }

    #[test]
    fn what_is_no_state_is_unknown() {
        for text in [&b""[..], b"9", b"-1", b"04", b"4\n", b"\xff"] {
            assert_eq!(XenbusState::parse(text), XenbusState::Unknown);
        }
    }
}
