//! Consoles, and other ports for bytes.

use serde::{Deserialize, Serialize};

use super::HostPath;

/// A device with ports. The first is a console, and is always there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Table", into = "Table")]
pub struct Console {
    /// Where the console is joined to; `None`: a pseudo-terminal.
    pub socket: Option<HostPath>,
    /// The other ports.
    pub ports: Vec<NamedPort>,
}

/// A port that programs of the guest open by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedPort {
    /// `/dev/virtio-ports/NAME` in a Linux guest.
    pub name: PortName,
    /// Where it is joined to; `None`: a pseudo-terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<HostPath>,
}

/// Ports besides the console: as many as QEMU's device has.
const MAX_PORTS: usize = 30;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    socket: Option<HostPath>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ports: Vec<NamedPort>,
}

impl TryFrom<Table> for Console {
    type Error = String;

    fn try_from(Table { socket, ports }: Table) -> Result<Self, String> {
        if ports.len() > MAX_PORTS {
            return Err(format!(
                "a console has at most {MAX_PORTS} further ports: give the others to a second console"
            ));
        }
        for (index, port) in ports.iter().enumerate() {
            if ports
                .iter()
                .take(index)
                .any(|other| other.name == port.name)
            {
                return Err(format!("there are two ports {:?}", port.name.as_str()));
            }
        }
        Ok(Self { socket, ports })
    }
}

impl From<Console> for Table {
    fn from(Console { socket, ports }: Console) -> Self {
        Self { socket, ports }
    }
}

/// What a port is called in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortName(String);

impl PortName {
    const LENGTH: usize = 63;

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PortName {
    type Error = &'static str;

    /// A file's name in the guest.
    fn try_from(name: String) -> Result<Self, &'static str> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > Self::LENGTH || !name.bytes().all(plain) {
            return Err(
                "a port has a name of 1 to 63 letters, digits and ._-, as in org.qemu.guest_agent.0",
            );
        }
        Ok(Self(name))
    }
}

impl From<PortName> for String {
    fn from(name: PortName) -> Self {
        name.0
    }
}
