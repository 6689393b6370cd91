//! Claimed registers: which they are, and the rule of each.

use super::bar::{self, Bar};
use super::interrupts::ControlWord;
use super::power::PowerControl;
use super::quirk::{Quirk, QuirkRefusal, Quirks};
use super::{Access, Identity, OpError, Operation, OverlayState, command, shift_of};
use crate::access::{AccessError, ConfigSpace, Width};
use crate::capabilities::{Capabilities, CapabilityId};
use crate::registers::header::{self, bist};
use crate::registers::{
    Block, Register, capability, express, msi, msix, power_management as pm, vpd,
};

/// Offset of the first byte behind the space of standard capabilities.
pub(super) const STANDARD_END: u16 = 0x100;

/// What a guest reads from a claimed register, and what becomes of its writes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rule {
    /// Reads as this value; writes are ignored.
    Fixed(u32),
    /// Reads as the device has it, less these bits; writes are ignored.
    ReadOnlyWithout(u32),
    /// Reads and writes reach the device.
    Passed,
    /// The command register.
    Command,
    /// The self-test register.
    Bist,
    /// A BAR, or half of one.
    Bar(Bar),
    /// The power management control and status register.
    PowerControl(PowerControl),
    /// The address register of the vital product data.
    VpdAddress,
    /// The control word of MSI or MSI-X.
    Interrupts(ControlWord),
    /// A register that the operator has opened in these bits.
    Quirk(u32),
}

/// Reads as the device has it; writes are ignored.
const READ_ONLY: Rule = Rule::ReadOnlyWithout(0);

/// What a guest sees of a register: some bits from the device, the others from a value.
pub(super) struct View {
    pub(super) from_device: u32,
    pub(super) value: u32,
}

/// A register and its rule.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    /// The register; its offset is that in the configuration space.
    pub(super) register: Register,
    pub(super) rule: Rule,
}

impl Claim {
    /// Bits below the register in its double word.
    pub(super) fn shift(&self) -> u32 {
        shift_of(self.register.offset)
    }

    /// Bits of the register in its double word.
    pub(super) fn lane(&self) -> u32 {
        self.register.width.mask().wrapping_shl(self.shift())
    }

    /// What the guest sees of the register.
    pub(super) const fn view(&self, state: &OverlayState) -> View {
        let all = self.register.width.mask();
        match &self.rule {
            Rule::Fixed(value) => View {
                from_device: 0,
                value: *value,
            },
            Rule::ReadOnlyWithout(hidden) => View {
                from_device: all & !*hidden,
                value: 0,
            },
            Rule::Command => command::view(state),
            Rule::Bar(bar) => View {
                from_device: 0,
                value: bar.value(state),
            },
            Rule::Passed
            | Rule::Bist
            | Rule::PowerControl(_)
            | Rule::VpdAddress
            | Rule::Interrupts(_)
            | Rule::Quirk(_) => View {
                from_device: all,
                value: 0,
            },
        }
    }

    /// Carries out a write of the whole register.
    pub(super) fn write<C: ConfigSpace + ?Sized>(
        &self,
        operation: &mut Operation<'_, C>,
        value: u32,
    ) -> Result<(), OpError> {
        let Register { offset, width, .. } = self.register;
        match &self.rule {
            Rule::Fixed(_) | Rule::ReadOnlyWithout(_) => {}
            Rule::Passed => operation.space.write(offset, width, value)?,
            Rule::Command => command::write(operation, (value & 0xffff) as u16)?,
            Rule::Bist => {
                let start = u32::from(bist::START);
                let current = operation.space.read(offset, width)?;
                if value == start || value & !start == current & !start {
                    operation.space.write(offset, width, value)?;
                }
            }
            Rule::Bar(bar) => bar.write(operation, offset, value)?,
            Rule::PowerControl(power) => power.write(operation, (value & 0xffff) as u16)?,
            Rule::VpdAddress => {
                if value & u32::from(vpd::address::WRITE) != 0 {
                    return Err(OpError::AccessDenied);
                }
                operation.space.write(offset, width, value)?;
            }
            Rule::Interrupts(word) => word.write(operation, (value & 0xffff) as u16)?,
            Rule::Quirk(mask) => {
                // The other bits keep what the device has. Those that are cleared by writing one are left alone, where that is known.
                let others = width.mask() & !mask & !self.register.rw1c;
                let mut wanted = value & mask;
                if others != 0 {
                    wanted |= operation.space.read(offset, width)? & others;
                }
                operation.space.write(offset, width, wanted)?;
            }
        }
        Ok(())
    }
}

/// A block of registers in the configuration space.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlacedBlock {
    pub(super) base: u16,
    pub(super) name: &'static str,
    pub(super) block: &'static Block,
}

/// The claimed registers of one function, and all its known blocks.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// In the order of offsets, without overlap.
    claims: Vec<Claim>,
    pub(super) blocks: Vec<PlacedBlock>,
    pub(super) power: Option<PowerControl>,
    pub(super) msi: Option<ControlWord>,
    pub(super) msix: Option<ControlWord>,
    /// Size of the space.
    end: u16,
}

impl Claims {
    pub(super) fn new<C: ConfigSpace + ?Sized>(
        identity: &Identity,
        capabilities: &Capabilities,
        space: &C,
    ) -> Result<Self, AccessError> {
        let mut claims = Self {
            end: identity.config_size.bytes(),
            ..Self::default()
        };
        claims.add_header(identity);
        for found in &capabilities.standard {
            claims.add_capability(found.id, found.offset, space)?;
        }
        for found in &capabilities.extended {
            let name = found.id.name().unwrap_or(capability::EXTENDED.name);
            claims.add_block(found.offset, name, &capability::EXTENDED);
        }
        // Quirks come and go while a guest is served: they find their places made.
        claims.claims.reserve_exact(Quirks::CAPACITY);
        Ok(claims)
    }

    /// Lets interrupt line and pin read as of a function that has neither.
    pub(super) fn hide_interrupt_line(&mut self) {
        for claim in &mut self.claims {
            if [&header::INTERRUPT_LINE, &header::INTERRUPT_PIN]
                .iter()
                .any(|register| register.offset == claim.register.offset)
            {
                claim.rule = Rule::Fixed(0);
            }
        }
    }

    /// The claimed registers that an access touches.
    pub(super) fn touched_by(&self, access: Access) -> impl Iterator<Item = &Claim> {
        let end = access.offset.saturating_add(access.width.bytes());
        let first = self
            .claims
            .partition_point(|claim| claim.register.end() <= access.offset);
        self.claims
            .iter()
            .skip(first)
            .take_while(move |claim| claim.register.offset < end)
    }

    /// The claim on the register that starts at `offset`.
    pub(super) fn at(&self, offset: u16) -> Option<&Claim> {
        let index = self
            .claims
            .binary_search_by_key(&offset, |claim| claim.register.offset);
        self.claims.get(index.ok()?)
    }

    /// Puts these quirks in the place of those that there were. Allocates nothing. One that [`Claims::place_for`] refuses has no effect.
    pub(super) fn set_quirks(&mut self, quirks: &Quirks) {
        self.claims
            .retain(|claim| !matches!(claim.rule, Rule::Quirk(_)));
        for quirk in quirks.iter() {
            if let Ok(index) = self.place_for(quirk) {
                let claim = Claim {
                    register: self.register_of(quirk),
                    rule: Rule::Quirk(quirk.mask()),
                };
                self.claims.insert(index, claim);
            }
        }
    }

    /// Where a quirk stands among the claims.
    pub(super) fn place_for(&self, quirk: Quirk) -> Result<usize, QuirkRefusal> {
        let end = quirk.offset().saturating_add(quirk.width().bytes());
        if end > self.end {
            return Err(QuirkRefusal::Beyond { size: self.end });
        }
        let index = self
            .claims
            .partition_point(|claim| claim.register.end() <= quirk.offset());
        match self.claims.get(index) {
            Some(next) if next.register.offset < end => Err(QuirkRefusal::Ruled {
                name: next.register.name,
            }),
            _ => Ok(index),
        }
    }

    /// The register that a quirk is for: a known one, or else one without a name, in which those bits are cleared by writing one that are in
    /// known registers.
    fn register_of(&self, quirk: Quirk) -> Register {
        let (offset, width) = (quirk.offset(), quirk.width());
        let mut found = Register::new("quirk", offset, width, "");
        for register in self.registers() {
            if (register.offset, register.width) == (offset, width) {
                return register;
            }
            let shift = |from: u16, to: u16| u32::from(to.saturating_sub(from)).saturating_mul(8);
            let bits = register
                .rw1c
                .checked_shr(shift(register.offset, offset))
                .unwrap_or(0);
            let bits = bits
                .checked_shl(shift(offset, register.offset))
                .unwrap_or(0);
            found.rw1c |= bits & width.mask();
        }
        found
    }

    /// The claims that are quirks.
    pub(super) fn quirks(&self) -> impl Iterator<Item = &Claim> {
        self.claims
            .iter()
            .filter(|claim| matches!(claim.rule, Rule::Quirk(_)))
    }

    /// All registers of all known blocks, where they are in the space.
    pub(super) fn registers(&self) -> impl Iterator<Item = Register> {
        self.blocks.iter().flat_map(|placed| {
            placed
                .block
                .registers
                .iter()
                .map(|register| register.at(placed.base))
        })
    }

    /// Keeps the function from signalling PME#, which nobody in dom0 waits for.
    pub(super) fn disable_pme<C: ConfigSpace + ?Sized>(
        &self,
        space: &C,
    ) -> Result<(), AccessError> {
        self.power.map_or(Ok(()), |power| power.disable_pme(space))
    }

    fn add_header(&mut self, identity: &Identity) {
        self.add_block(0, header::TYPE_0.name, &header::TYPE_0);
        self.add(
            0,
            &header::VENDOR_ID,
            Rule::Fixed(u32::from(identity.vendor)),
        );
        self.add(
            0,
            &header::DEVICE_ID,
            Rule::Fixed(u32::from(identity.device)),
        );
        self.add(0, &header::COMMAND, Rule::Command);
        self.add(0, &header::CACHE_LINE_SIZE, Rule::Passed);
        self.add(0, &header::LATENCY_TIMER, READ_ONLY);
        self.add(0, &header::BIST, Rule::Bist);
        for (register, bar) in bar::all(&identity.resources) {
            self.add(0, register, Rule::Bar(bar));
        }
        let line = u32::from(identity.interrupt_line);
        self.add(0, &header::INTERRUPT_LINE, Rule::Fixed(line));
        self.add(0, &header::INTERRUPT_PIN, READ_ONLY);
    }

    fn add_capability<C: ConfigSpace + ?Sized>(
        &mut self,
        id: CapabilityId,
        base: u16,
        space: &C,
    ) -> Result<(), AccessError> {
        let word = |register: &Register| -> Result<u16, AccessError> {
            let register = register.at(base);
            if register.end() > STANDARD_END {
                return Ok(0);
            }
            Ok((space.read(register.offset, Width::Two)? & 0xffff) as u16)
        };
        match id {
            CapabilityId::VPD => {
                self.add_start(base, &vpd::BLOCK);
                self.add(base, &vpd::ADDRESS, Rule::VpdAddress);
                self.add(base, &vpd::DATA, READ_ONLY);
            }
            CapabilityId::POWER_MANAGEMENT => {
                self.add_start(base, &pm::BLOCK);
                let hidden = u32::from(pm::capabilities::PME_SUPPORT);
                self.add(base, &pm::CAPABILITIES, Rule::ReadOnlyWithout(hidden));
                let power = PowerControl::new(base, word(&pm::CAPABILITIES)?);
                if self.add(base, &pm::CONTROL, Rule::PowerControl(power)) {
                    self.power.get_or_insert(power);
                }
                self.add(base, &pm::BRIDGE_EXTENSIONS, READ_ONLY);
                self.add(base, &pm::DATA, READ_ONLY);
            }
            CapabilityId::MSI => {
                let block = msi::block(word(&msi::CONTROL)?);
                self.add_start(base, block);
                let control = ControlWord::msi(base);
                if self.add(base, &msi::CONTROL, Rule::Interrupts(control)) {
                    self.msi.get_or_insert(control);
                }
                self.add_rest_read_only(base, block);
            }
            CapabilityId::MSI_X => {
                self.add_start(base, &msix::BLOCK);
                let control = ControlWord::msix(base);
                if self.add(base, &msix::CONTROL, Rule::Interrupts(control)) {
                    self.msix.get_or_insert(control);
                }
                self.add_rest_read_only(base, &msix::BLOCK);
            }
            CapabilityId::PCI_EXPRESS => {
                let block = express::block(word(&express::CAPABILITIES)?);
                self.add_block(base, block.name, block);
            }
            other => {
                let name = other.name().unwrap_or(capability::STANDARD.name);
                self.add_block(base, name, &capability::STANDARD);
            }
        }
        Ok(())
    }

    /// Adds a capability whose identity and link no guest can change, whatever its policy.
    fn add_start(&mut self, base: u16, block: &'static Block) {
        self.add_block(base, block.name, block);
        self.add(base, &capability::ID, READ_ONLY);
        self.add(base, &capability::NEXT, READ_ONLY);
    }

    /// Where messages go to and what they say is Xen's business (XSA-128, XSA-129): no policy opens these registers.
    fn add_rest_read_only(&mut self, base: u16, block: &'static Block) {
        for register in block.registers {
            // Those that have a rule already keep it.
            self.add(base, register, READ_ONLY);
        }
    }

    fn add_block(&mut self, base: u16, name: &'static str, block: &'static Block) {
        self.blocks.push(PlacedBlock { base, name, block });
    }

    /// Claims a register. On a broken device it may overlap another or reach beyond the space; then
    /// it is left without a rule, and this returns false.
    fn add(&mut self, base: u16, register: &Register, rule: Rule) -> bool {
        let register = register.at(base);
        let index = self
            .claims
            .partition_point(|claim| claim.register.end() <= register.offset);
        let overlaps = self
            .claims
            .get(index)
            .is_some_and(|next| next.register.offset < register.end());
        if overlaps || register.end() > STANDARD_END {
            return false;
        }
        self.claims.insert(index, Claim { register, rule });
        true
    }
}
