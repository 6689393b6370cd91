//! The configuration space, register by register, as a person would want to see it.

use super::claim::{Claim, Claims, Rule, STANDARD_END};
use crate::access::ConfigSize;
use crate::registers::{BitField, Register};

/// What becomes of a guest's access to a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Treatment {
    /// The value comes from the daemon; writes do not reach the device, or only as a rule says.
    Emulated,
    /// Reads come from the device, writes reach it.
    Passed,
    /// Reads come from the device, in part or whole; writes reach it as far as a rule says.
    Filtered,
    /// Reads come from the device; writes are ignored, whatever the policy.
    ReadOnly,
    /// Reads come from the device; writes are dropped, unless the policy is permissive.
    Dropped,
    /// Reads give zero; writes are ignored.
    Hidden,
}

/// One register, or a run of bytes of which no register is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Name of the block that it is in; empty for a run of bytes between blocks.
    pub block: &'static str,
    /// Name; empty for a run of bytes.
    pub name: &'static str,
    /// Offset in bytes.
    pub offset: u16,
    /// Length in bytes: 1, 2 or 4 for a register.
    pub length: u16,
    /// What becomes of a guest's access.
    pub treatment: Treatment,
    /// Where the register is specified; empty for a run of bytes.
    pub spec: &'static str,
    /// The register's own fields.
    pub bits: &'static [BitField],
}

impl Rule {
    const fn treatment(&self) -> Treatment {
        match self {
            Self::Fixed(_) => Treatment::Emulated,
            Self::Bar(bar) if !bar.is_present() => Treatment::Hidden,
            Self::Bar(_) => Treatment::Emulated,
            Self::ReadOnlyWithout(0) => Treatment::ReadOnly,
            Self::Passed => Treatment::Passed,
            Self::ReadOnlyWithout(_)
            | Self::Command
            | Self::Bist
            | Self::PowerControl(_)
            | Self::VpdAddress
            | Self::Interrupts(_)
            | Self::Quirk(_) => Treatment::Filtered,
        }
    }
}

/// Lists the whole space without overlap. Of registers that overlap on a broken device it names the
/// claimed one, or else that of the first block.
pub(super) fn list(claims: &Claims, size: ConfigSize) -> Vec<Field> {
    let mut named: Vec<(&'static str, Register, Option<&Claim>)> = Vec::new();
    for placed in &claims.blocks {
        for register in placed.block.registers {
            let register = register.at(placed.base);
            if placed.base < STANDARD_END && register.end() > STANDARD_END {
                continue;
            }
            let claim = claims
                .at(register.offset)
                .filter(|claim| claim.register == register);
            named.push((placed.name, register, claim));
        }
    }
    // Registers that only a quirk knows.
    for claim in claims.quirks() {
        if !named.iter().any(|(_, known, _)| *known == claim.register) {
            named.push(("Quirks", claim.register, Some(claim)));
        }
    }
    // Stable: of two at one offset, the first block's stays first, behind a claimed one.
    named.sort_by_key(|(_, register, claim)| (register.offset, claim.is_none()));

    let mut fields = Vec::new();
    let mut next = 0;
    for (index, (block, register, claim)) in named.iter().enumerate() {
        let hides_claimed = claim.is_none()
            && named
                .iter()
                .skip(index)
                .take_while(|(_, other, _)| other.offset < register.end())
                .any(|(_, _, claim)| claim.is_some());
        if register.offset < next || register.end() > size.bytes() || hides_claimed {
            continue;
        }
        fields.extend(gap(next, register.offset));
        fields.push(Field {
            block,
            name: register.name,
            offset: register.offset,
            length: register.width.bytes(),
            treatment: claim.map_or(Treatment::Dropped, |claim| claim.rule.treatment()),
            spec: register.spec,
            bits: register.fields,
        });
        next = register.end();
    }
    fields.extend(gap(next, size.bytes()));
    fields
}

fn gap(start: u16, end: u16) -> Option<Field> {
    let length = end.checked_sub(start).filter(|length| *length > 0)?;
    Some(Field {
        block: "",
        name: "",
        offset: start,
        length,
        treatment: Treatment::Dropped,
        spec: "",
        bits: &[],
    })
}
