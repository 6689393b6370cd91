//! What a guest sees and may change of one function's configuration space.
//!
//! Some registers are *claimed*: a rule says what a guest reads there and what
//! becomes of what it writes. All others read as the device has them, and writes to them are
//! dropped unless the guest's [`Policy`] is permissive. [`Overlay::fields`] lists it all for one
//! function.
//!
//! | module | decides on |
//! |---|---|
//! | `claim` | which registers are claimed, and the simple rules |
//! | `command` | the command register |
//! | `bar` | base address registers and the expansion ROM |
//! | `power` | power management |
//! | `interrupts` | the MSI and MSI-X control words |
//! | `policy` | what an operator allows beyond that |
//! | `quirk` | single registers that an operator opens |
//! | `fields` | the listing |
//!
//! The rules are those of Linux's xen-pciback where guests depend on them; their numbers are also
//! in the names of the tests:
//!
//! - C-1: an access has 1, 2 or 4 bytes and is aligned.
//! - C-2: it lies within the space. Negative offsets are refused; in the kernel they alias others.
//! - C-3: a read takes each bit from the device or from the claim on it; a partial one too.
//! - C-4: a write to part of a claimed register keeps its other bytes. Bytes of the same write that
//!   no claim covers are dropped, even if the policy is permissive.
//! - C-5: a write that touches no claim is dropped, and succeeds; if the policy is permissive, it
//!   reaches the device.
//! - C-6: where two capabilities overlap or one reaches beyond the space, as on a broken device,
//!   the register found first keeps its rule and the other gets none.
//! - C-7: failures have the numbers of the shared page, and no others: see [`OpError`].
//! - C-8: a guest can clear PME_Status, which is cleared by writing one. The kernel drops that.
//! - C-9: a guest controls the power state; it cannot make the device signal PME#.
//! - C-10: IDs, BARs and the memory decode bit of a virtual function are emulated.
//!
//! - C-11: the interrupt line of a function that may not use it ([`Overlay::without_intx`]) is none.
//!
//! Two more differences from the kernel are on purpose. Nothing that a guest wrote reaches the next
//! one ([`Overlay::release`]). And a permissive policy does not open the MSI and MSI-X capabilities,
//! which belong to the daemon and Xen: a guest that turned MSI on behind their backs would get
//! interrupts that nobody has mapped, one that turned it off would leave mappings behind that no
//! longer match the device, and one that wrote address and data would choose what is written where.
//!
//! What an operator allows beyond the rules is in a [`Policy`], which comes with each write, and in [`Quirks`], which are claims of their own.

mod bar;
mod claim;
mod command;
mod error;
mod fields;
mod interrupts;
mod policy;
mod power;
pub mod quirk;
mod state;

pub use error::{BuildError, OpError};
pub use fields::{Field, Treatment};
pub use policy::{Permissive, Policy, Range, RangeError, Ranges, TooManyRanges};
pub use power::{PowerChange, PowerState};
pub use quirk::{Quirk, QuirkRefusal, Quirks};
pub use state::OverlayState;

use claim::{Claim, Claims};

use crate::access::{ConfigSize, ConfigSpace, Width};
use crate::address::Bdf;
use crate::capabilities::Capabilities;
use crate::registers::header;
use crate::resource::Resource;

/// What the host knows of a function, and its registers may not say: those of a virtual function
/// least of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Physical address.
    pub bdf: Bdf,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Whether it is a virtual function of an SR-IOV device.
    pub is_virtual_function: bool,
    /// What the guest reads as interrupt line: the low 8 bits of the GSI that the toolstack maps
    /// for it, 0 if there is none.
    pub interrupt_line: u8,
    /// What BARs 0 to 5 and, last, the expansion ROM decode. The upper half of a 64-bit BAR is
    /// [`Resource::ABSENT`].
    pub resources: [Resource; 7],
    /// Size of its configuration space.
    pub config_size: ConfigSize,
}

/// What a write did, beyond the configuration space, that its session must act on before it stores
/// the overlay's state and answers the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Effect {
    /// The guest has switched the device on. Decode is on in hardware.
    pub decode_enabled: bool,
    /// The device has changed its power state.
    pub power: Option<PowerChange>,
    /// A write that was dropped since no rule covers it and the policy does not let it through.
    pub dropped: Option<DroppedWrite>,
}

/// A write that did not reach the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DroppedWrite {
    /// Offset.
    pub offset: u16,
    /// Width.
    pub width: Width,
    /// What was written.
    pub value: u32,
}

/// What a guest sees and may change of one function.
#[derive(Debug)]
pub struct Overlay {
    identity: Identity,
    capabilities: Capabilities,
    claims: Claims,
    /// Decode bits of the command register that the function has use for.
    decode: u16,
    /// The guest has no part in the function's interrupt line.
    without_intx: bool,
    initial: OverlayState,
    state: OverlayState,
}

impl Overlay {
    /// Builds the overlay of a function, which must be in D0, and keeps it from signalling PME#.
    ///
    /// # Errors
    /// It is a bridge, does not answer, or cannot be accessed: see [`BuildError`].
    pub fn new<C: ConfigSpace + ?Sized>(
        identity: &Identity,
        space: &C,
    ) -> Result<Self, BuildError> {
        let bdf = identity.bdf;
        let access = |source| BuildError::Access { bdf, source };
        refuse_bridges(bdf, space)?;
        let capabilities = Capabilities::walk(space, identity.config_size).map_err(access)?;
        let claims = Claims::new(identity, &capabilities, space).map_err(access)?;
        claims.disable_pme(space).map_err(access)?;
        let command = space
            .read(header::COMMAND.offset, Width::Two)
            .map_err(access)?;
        // INTx off is the daemon's doing, if a guest had MSI on when the daemon was restarted.
        let command = (command & 0xffff) as u16 & !header::command::INTX_DISABLE;
        let initial = OverlayState::untouched(command);
        let decode = command::decode_bits(identity);
        let identity = identity.clone();
        Ok(Self {
            identity,
            capabilities,
            claims,
            decode,
            without_intx: false,
            initial,
            state: initial,
        })
    }

    /// Takes the interrupt line from the guest: it reads that the function has none, as virtual functions have none, and whatever it
    /// writes, INTX_DISABLE stays set in hardware once a write of the command register or [`Overlay::command_to_restore`] has set it.
    pub fn without_intx(mut self) -> Self {
        self.without_intx = true;
        self.claims.hide_interrupt_line();
        self
    }

    /// What the guest reads. `offset` and `size` are the guest's, unchecked.
    ///
    /// # Errors
    /// See [`OpError`].
    pub fn read<C: ConfigSpace + ?Sized>(
        &self,
        space: &C,
        offset: i32,
        size: i32,
    ) -> Result<u32, OpError> {
        let access = Access::new(offset, size, self.identity.config_size)?;
        let mut from_device = access.lane;
        let mut value = 0;
        for claim in self.claims.touched_by(access) {
            let view = claim.view(&self.state);
            let (shift, lane) = (claim.shift(), claim.lane());
            from_device &= !lane | view.from_device.wrapping_shl(shift);
            value |= view.value.wrapping_shl(shift);
        }
        if from_device != 0 {
            let device = space.read(access.offset, access.width)?;
            value |= device.wrapping_shl(access.shift) & from_device;
        }
        Ok((value & access.lane).wrapping_shr(access.shift))
    }

    /// Writes what the guest may write. `offset`, `size` and `value` are the guest's, unchecked.
    ///
    /// Repeating a write that was carried out, but not answered when the daemon died, does no harm.
    ///
    /// # Errors
    /// See [`OpError`]. The overlay's state is then as before.
    pub fn write<C: ConfigSpace + ?Sized>(
        &mut self,
        space: &C,
        offset: i32,
        size: i32,
        value: u32,
        policy: &Policy,
    ) -> Result<Effect, OpError> {
        let access = Access::new(offset, size, self.identity.config_size)?;
        let before = self.state;
        let result = self.carry_out(space, access, value, policy);
        if result.is_err() {
            // Effects that nobody hears of are reported when the guest tries again.
            self.state = before;
        }
        result
    }

    /// All that this guest's writes have left behind in the overlay.
    pub const fn state(&self) -> OverlayState {
        self.state
    }

    /// Takes on a state from before a restart of the daemon.
    pub const fn set_state(&mut self, state: OverlayState) {
        self.state = state;
    }

    /// Opens the registers of these quirks to the guest, and closes those of earlier ones. Allocates nothing. Quirks that
    /// [`Overlay::refuses`] have no effect.
    pub fn set_quirks(&mut self, quirks: &Quirks) {
        self.claims.set_quirks(quirks);
    }

    /// Why a quirk would have no effect on this function besides those that it has.
    pub fn refuses(&self, quirk: Quirk) -> Option<QuirkRefusal> {
        self.claims.place_for(quirk).err()
    }

    /// Forgets what the guest wrote: the next one finds the overlay as it was when built.
    pub const fn release(&mut self) {
        self.state = self.initial;
    }

    /// The command register that the hardware is to have after its configuration was restored
    /// under a living guest: `saved`, with decode on, and those bits that follow the guest as the
    /// guest wants them.
    pub const fn command_to_restore(&self, saved: u16) -> u16 {
        let intx = if self.without_intx {
            header::command::INTX_DISABLE
        } else {
            0
        };
        (saved & !command::FOLLOWS_GUEST)
            | (self.state.command & command::FOLLOWS_GUEST)
            | self.decode
            | intx
    }

    /// The function it belongs to.
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The function's capabilities, and what is wrong with their lists.
    pub const fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The whole configuration space as the guest sees it: every register by name, everything
    /// between them as gaps, in the order of offsets, without overlap.
    pub fn fields(&self) -> impl Iterator<Item = Field> + use<> {
        fields::list(&self.claims, self.identity.config_size).into_iter()
    }

    fn carry_out<C: ConfigSpace + ?Sized>(
        &mut self,
        space: &C,
        access: Access,
        value: u32,
        policy: &Policy,
    ) -> Result<Effect, OpError> {
        let guest = value.wrapping_shl(access.shift) & access.lane;
        let mut handled = false;
        let mut operation = Operation {
            space,
            policy,
            claims: &self.claims,
            decode: self.decode,
            without_intx: self.without_intx,
            is_virtual_function: self.identity.is_virtual_function,
            state: &mut self.state,
            effect: Effect::default(),
        };
        for claim in self.claims.touched_by(access) {
            // Bytes beside the claimed ones are dropped, even with a permissive policy.
            handled = true;
            let shift = claim.shift();
            let written = (access.lane & claim.lane()).wrapping_shr(shift);
            let value = guest.wrapping_shr(shift) & written;
            let merged = operation.merge(claim, value, written)?;
            claim.write(&mut operation, merged)?;
        }
        if !handled {
            if policy.lets_through(access.offset, access.width) {
                space.write(access.offset, access.width, value & access.width.mask())?;
            } else {
                operation.effect.dropped = Some(DroppedWrite {
                    offset: access.offset,
                    width: access.width,
                    value: value & access.width.mask(),
                });
            }
        }
        Ok(operation.effect)
    }
}

fn refuse_bridges<C: ConfigSpace + ?Sized>(bdf: Bdf, space: &C) -> Result<(), BuildError> {
    let register = space.read(header::HEADER_TYPE.offset, header::HEADER_TYPE.width);
    let register = register.map_err(|source| BuildError::Access { bdf, source })?;
    if register == header::HEADER_TYPE.width.mask() {
        return Err(BuildError::NoAnswer { bdf });
    }
    match (register & u32::from(header::header_type::LAYOUT)) as u8 {
        header::header_type::ENDPOINT => Ok(()),
        header_type @ (header::header_type::BRIDGE | header::header_type::CARDBUS) => {
            Err(BuildError::Bridge { bdf, header_type })
        }
        header_type => Err(BuildError::UnknownHeader { bdf, header_type }),
    }
}

/// A checked access: aligned and within the space, and so within one double word.
#[derive(Debug, Clone, Copy)]
struct Access {
    offset: u16,
    width: Width,
    /// Bits below it in its double word.
    shift: u32,
    /// Its bits in the double word.
    lane: u32,
}

impl Access {
    fn new(offset: i32, size: i32, space: ConfigSize) -> Result<Self, OpError> {
        let width = u32::try_from(size).ok().and_then(Width::from_bytes);
        let width = width.ok_or(OpError::InvalidOffset)?;
        let offset = u16::try_from(offset).map_err(|_| OpError::InvalidOffset)?;
        if !width.is_aligned(offset) || offset >= space.bytes() {
            return Err(OpError::InvalidOffset);
        }
        let shift = shift_of(offset);
        Ok(Self {
            offset,
            width,
            shift,
            lane: width.mask().wrapping_shl(shift),
        })
    }
}

/// Bits below `offset` in its double word.
fn shift_of(offset: u16) -> u32 {
    u32::from(offset & 3).wrapping_mul(8)
}

/// A guest's write that is being carried out.
struct Operation<'a, C: ?Sized> {
    space: &'a C,
    policy: &'a Policy,
    claims: &'a Claims,
    decode: u16,
    without_intx: bool,
    is_virtual_function: bool,
    state: &'a mut OverlayState,
    effect: Effect,
}

impl<C: ConfigSpace + ?Sized> Operation<'_, C> {
    /// What a claimed register would hold if it took the bits of `value` that are in `written`.
    ///
    /// Bytes that the guest did not write keep what it reads there, except for bits that are
    /// cleared by writing one: those it did not touch.
    fn merge(&self, claim: &Claim, value: u32, written: u32) -> Result<u32, OpError> {
        let register = &claim.register;
        let kept = register.width.mask() & !written & !register.rw1c;
        if kept == 0 {
            return Ok(value);
        }
        let view = claim.view(self.state);
        let mut current = view.value;
        if view.from_device & kept != 0 {
            current |= self.space.read(register.offset, register.width)? & view.from_device;
        }
        Ok((current & kept) | value)
    }

    fn read_word(&self, offset: u16) -> Result<u16, OpError> {
        Ok((self.space.read(offset, Width::Two)? & 0xffff) as u16)
    }

    fn write_word(&self, offset: u16, value: u16) -> Result<(), OpError> {
        Ok(self.space.write(offset, Width::Two, u32::from(value))?)
    }
}
