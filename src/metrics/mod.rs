//! Metrics for Prometheus: at the unix socket `RUN_DIR/metrics.sock`, and at a TCP port of the loopback interface if the configuration
//! names one.
//!
//! | module | holds |
//! |---|---|
//! | this one | where they are to be had |
//! | [`text`] | the metrics by name, in Prometheus' text format |
//! | [`server`] | the little of HTTP that a scrape needs |

pub mod server;
pub mod text;

use std::fmt;
use std::net::SocketAddr;

use serde::Deserialize;

/// The socket's name in the run directory.
pub const SOCKET: &str = "metrics.sock";

/// An address that only this machine reaches: the metrics name guests and devices, and nobody is asked who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Loopback(SocketAddr);

/// A text that is no such address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// It cannot be read.
    #[error("'{0}' is no address with a port: 127.0.0.1:9465 or [::1]:9465")]
    Malformed(String),
    /// Others could reach it.
    #[error(
        "{0} can be reached from outside; metrics are for this machine alone: 127.0.0.1:{port} or [::1]:{port}, and a proxy that asks \
         who they are for",
        port = .0.port()
    )]
    Open(SocketAddr),
}

impl TryFrom<String> for Loopback {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        let address: SocketAddr = text.parse().map_err(|_| AddressError::Malformed(text))?;
        if address.ip().is_loopback() {
            Ok(Self(address))
        } else {
            Err(AddressError::Open(address))
        }
    }
}

impl Loopback {
    /// The address.
    pub fn get(self) -> SocketAddr {
        self.0
    }
}

impl fmt::Display for Loopback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_loopback_interface_are_taken() {
        for good in ["127.0.0.1:9465", "127.1.2.3:0", "[::1]:9465"] {
            assert_eq!(
                Loopback::try_from(good.to_owned()).unwrap().to_string(),
                good
            );
        }
        for open in [
            "0.0.0.0:9465",
            "[::]:9465",
            "192.168.0.1:9465",
            "[::ffff:127.0.0.1]:9465",
        ] {
            let error = Loopback::try_from(open.to_owned()).unwrap_err();
            assert!(matches!(error, AddressError::Open(_)), "{open}");
        }
        for bad in ["", "9465", "localhost:9465", "127.0.0.1", "127.0.0.1:99999"] {
            let error = Loopback::try_from(bad.to_owned()).unwrap_err();
            assert!(matches!(error, AddressError::Malformed(_)), "{bad}");
        }
    }
}
