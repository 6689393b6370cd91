//! Permissions of nodes.

use std::fmt;

use crate::types::DomId;

/// What a domain may do with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Nothing (`n`).
    None,
    /// Read (`r`).
    Read,
    /// Write (`w`).
    Write,
    /// Read and write (`b`).
    Both,
}

/// One entry of a node's permissions. The first entry of a list names the owner, who may do
/// everything; its `access` is what every domain may do that has no entry of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Perm {
    /// The domain.
    pub domain: DomId,
    /// What it may do.
    pub access: Access,
}

impl Perm {
    /// Reads an entry as it is on the wire: a letter and a decimal domain id, `r5`.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (letter, number) = text.split_first()?;
        let access = match letter {
            b'n' => Access::None,
            b'r' => Access::Read,
            b'w' => Access::Write,
            b'b' => Access::Both,
            _ => return None,
        };
        let domain = std::str::from_utf8(number).ok()?.parse().ok()?;
        Some(Self { domain, access })
    }
}

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.access {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::Both => 'b',
        };
        write!(f, "{letter}{}", self.domain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_survive_the_way_over_the_wire() {
        for access in [Access::None, Access::Read, Access::Write, Access::Both] {
            let perm = Perm {
                domain: DomId(17),
                access,
            };
            assert_eq!(Perm::parse(perm.to_string().as_bytes()), Some(perm));
        }
    }

    #[test]
    fn what_is_no_permission_is_refused() {
        for text in ["", "r", "x0", "r-1", "r65536", "0", "r0 "] {
            assert_eq!(Perm::parse(text.as_bytes()), None, "{text:?}");
        }
    }
}
