//! Enabling, disabling, releasing and recovering the interrupts of one device.

use conf_space::registers::header::{self, command};
use conf_space::registers::{msi, msix, power_management};
use conf_space::{AccessError, ConfigSpace, Width};
use xenbus::pciif::{MAX_VECTORS, MsixEntry};
use xenbus::{MsiRequest, Pirq};

use crate::interrupts::{Interrupts, MsiX};
use crate::ledger::{self, Held, Kind, Ledger, Phase};
use crate::pirqs::{self, Pirqs, sweep};
use crate::refusal::{CleanupError, Refusal};

/// A device's interrupts with all that is needed to act on them. Made by [`Interrupts::operate`]
/// for the time of a call: it keeps nothing itself, all that changes is in the ledger and in the
/// device.
///
/// Not to be used from two threads at once for the same device.
pub struct Operations<'a> {
    interrupts: &'a Interrupts,
    config: &'a dyn ConfigSpace,
    pirqs: &'a dyn Pirqs,
    ledger: &'a dyn Ledger,
}

/// The PIRQs of the entries that were asked for, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vectors {
    pirqs: [u16; MAX_VECTORS],
    count: usize,
}

impl Vectors {
    /// The PIRQs.
    pub fn as_slice(&self) -> &[u16] {
        self.pirqs.get(..self.count).unwrap_or_default()
    }
}

/// What a daemon found that started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovered {
    /// The device holds nothing.
    Nothing,
    /// MSI or MSI-X is on, as it was.
    Enabled(Kind),
    /// The daemon had been killed amid enabling or disabling. The device holds nothing now.
    Undone {
        /// PIRQs unmapped that were in no ledger.
        swept: usize,
    },
}

/// Whether the device of this configuration space decodes memory. For a virtual function, ask its
/// physical function.
///
/// # Errors
/// When it cannot be read.
pub fn memory_decode<C: ConfigSpace + ?Sized>(config: &C) -> Result<bool, AccessError> {
    let value = config.read(header::COMMAND.offset, header::COMMAND.width)?;
    Ok(value & u32::from(command::MEMORY) != 0)
}

/// All ones: nothing answers.
const NO_ANSWER: u16 = 0xffff;

impl<'a> Operations<'a> {
    pub(crate) fn new(
        interrupts: &'a Interrupts,
        config: &'a dyn ConfigSpace,
        pirqs: &'a dyn Pirqs,
        ledger: &'a dyn Ledger,
    ) -> Self {
        Self {
            interrupts,
            config,
            pirqs,
            ledger,
        }
    }

    /// Enables MSI with `count` vectors and returns the first PIRQ; the others follow it. If it is
    /// on already, it is set up anew.
    ///
    /// # Errors
    /// [`Refusal`]; the device then holds nothing, or what it held before if the request is not
    /// even tried.
    pub fn enable_msi(&self, count: u32) -> Result<Pirq, Refusal> {
        let most = self.interrupts.msi.ok_or(Refusal::None(Kind::Msi))?.vectors;
        let vectors = u8::try_from(count)
            .ok()
            .filter(|count| count.is_power_of_two() && *count <= most)
            .ok_or(Refusal::Count { count, most })?;
        self.check_none_is_on_but(Kind::Msi)?;
        self.check_awake()?;
        let request = match vectors {
            1 => MsiRequest::Msi,
            count => MsiRequest::MultiMsi { count },
        };
        let held = self.begin(Kind::Msi, u16::from(vectors))?;
        self.undo_on_error(held, || {
            let pirq = self.map(0, 0, request)?;
            self.finish(held)?;
            Ok(Pirq(u32::from(pirq)))
        })
    }

    /// Enables MSI-X for the first `count` of `entries`, both as the guest gave them. If it is on
    /// already, it is set up anew.
    ///
    /// `memory_decode` is asked whether the device decodes memory: [`memory_decode`] of it or, for
    /// a virtual function, of its physical function.
    ///
    /// # Errors
    /// [`Refusal`]; the device then holds nothing, or what it held before if the request is not
    /// even tried.
    pub fn enable_msix(
        &self,
        entries: &[MsixEntry],
        count: u32,
        memory_decode: impl FnOnce() -> Result<bool, AccessError>,
    ) -> Result<Vectors, Refusal> {
        let entries = usize::try_from(count)
            .ok()
            .filter(|count| *count <= MAX_VECTORS)
            .and_then(|count| entries.get(..count))
            .ok_or(Refusal::TooMany { count })?;
        self.check_none_is_on_but(Kind::MsiX)?;
        if !memory_decode()? {
            return Err(Refusal::MemoryDecodeOff);
        }
        let msix = self
            .interrupts
            .msix
            .ok_or(Refusal::None(Kind::MsiX))?
            .map_err(Refusal::Broken)?;
        let count = check_entries(entries, msix)?;
        self.check_awake()?;
        let held = self.begin(Kind::MsiX, count)?;
        self.undo_on_error(held, || {
            let mut vectors = Vectors {
                pirqs: [0; MAX_VECTORS],
                count: entries.len(),
            };
            for (slot, (entry, vector)) in entries.iter().zip(&mut vectors.pirqs).enumerate() {
                let request = MsiRequest::MsiX {
                    entry: entry.entry,
                    table_base: msix.table_base,
                };
                *vector = self.map(slot, entry.entry, request)?;
            }
            self.finish(held)?;
            Ok(vectors)
        })
    }

    /// Disables whichever is on: guests of Linux 5.16 and later send `disable_msi` for MSI-X too.
    /// If none is on, does nothing.
    ///
    /// # Errors
    /// [`CleanupError`]. For the guest it is disabled nevertheless: nothing reaches it any more
    /// that it can take for an interrupt.
    pub fn disable_msi(&self) -> Result<(), CleanupError> {
        Held::read(self.ledger).map_or(Ok(()), |held| self.undo(held))
    }

    /// Disables MSI-X. If it is not on, does nothing.
    ///
    /// # Errors
    /// As [`Operations::disable_msi`].
    pub fn disable_msix(&self) -> Result<(), CleanupError> {
        Held::read(self.ledger)
            .filter(|held| held.kind == Kind::MsiX)
            .map_or(Ok(()), |held| self.undo(held))
    }

    /// The device leaves its domain: disables whatever is on, through us or not, and unmaps all it
    /// holds. The ledger is empty afterwards in any case.
    ///
    /// # Errors
    /// [`CleanupError`]. A PIRQ that Xen does not take back is the domain's until its end.
    pub fn release(&self) -> Result<(), CleanupError> {
        let undone = Held::read(self.ledger).map_or(Ok(()), |held| self.undo(held));
        let off = [Kind::Msi, Kind::MsiX].map(|kind| gone_is_off(self.switch_off(kind)));
        ledger::clear(self.ledger);
        undone?;
        off.into_iter()
            .collect::<Result<(), _>>()
            .map_err(CleanupError::Config)
    }

    /// Sets the enable bits again, of a device that was reset under a live guest and whose
    /// addresses and data Xen has restored (`PHYSDEVOP_restore_msi_ext`). Returns what is on.
    ///
    /// # Errors
    /// When configuration space cannot be used.
    pub fn reprogram(&self) -> Result<Option<Kind>, AccessError> {
        let Some(held) = Held::read(self.ledger).filter(|held| held.phase == Phase::Enabled) else {
            return Ok(None);
        };
        self.switch_on(held)?;
        Ok(Some(held.kind))
    }

    /// To be called once after a start of the daemon, before anything else, for each device of a
    /// domain: keeps what is on, and undoes what the daemon was killed in the middle of.
    ///
    /// If that was mapping, one PIRQ may be mapped that no ledger names: `candidates` are searched
    /// for it, as [`sweep`] does, which also says what `claimed` must know.
    ///
    /// # Errors
    /// [`CleanupError`].
    pub fn recover(
        &self,
        candidates: impl IntoIterator<Item = Pirq>,
        claimed: impl Fn(Pirq) -> bool,
    ) -> Result<Recovered, CleanupError> {
        let Some(held) = Held::read(self.ledger) else {
            return Ok(Recovered::Nothing);
        };
        let swept = match held.phase {
            Phase::Enabled => return Ok(Recovered::Enabled(held.kind)),
            Phase::Undoing => 0,
            // While the state still says so: if we are killed now, the search is done again.
            Phase::Mapping => sweep(self.pirqs, candidates, |pirq| {
                claimed(pirq) || Held::pirqs(self.ledger).any(|own| own == pirq)
            }),
        };
        self.undo(held)?;
        Ok(Recovered::Undone { swept })
    }

    /// Refuses if something is on that is not ours to set up anew.
    fn check_none_is_on_but(&self, kind: Kind) -> Result<(), Refusal> {
        let held = match Held::read(self.ledger) {
            Some(held) if held.phase == Phase::Enabled => Some(held.kind),
            Some(left_over) => {
                self.undo(left_over)?;
                None
            }
            None => None,
        };
        for other in [Kind::MsiX, Kind::Msi] {
            let ours = held == Some(other);
            if ours && other != kind {
                return Err(Refusal::OtherIsOn(other));
            }
            if !ours && self.is_on(other)? {
                return Err(if other == kind {
                    Refusal::IsOn(other)
                } else {
                    Refusal::OtherIsOn(other)
                });
            }
        }
        Ok(())
    }

    fn check_awake(&self) -> Result<(), Refusal> {
        let Some(offset) = self.interrupts.power else {
            return Ok(());
        };
        if self.read(offset)? & power_management::control::POWER_STATE != 0 {
            return Err(Refusal::Asleep);
        }
        Ok(())
    }

    /// Gives back what is held, and writes down what is about to be mapped.
    fn begin(&self, kind: Kind, count: u16) -> Result<Held, Refusal> {
        if let Some(held) = Held::read(self.ledger) {
            self.undo(held)?;
        }
        for slot in 0..usize::from(count) {
            ledger::set_mapped(self.ledger, slot, None);
        }
        let held = Held {
            kind,
            count,
            phase: Phase::Mapping,
            intx: self.read(header::COMMAND.offset)? & command::INTX_DISABLE == 0,
        };
        held.write(self.ledger);
        Ok(held)
    }

    /// Maps one vector, or one block, and writes it down.
    fn map(&self, slot: usize, entry: u16, request: MsiRequest) -> Result<u16, Refusal> {
        let pirq = self.pirqs.map(request).map_err(Refusal::Xen)?;
        let Some(number) = u16::try_from(pirq.0).ok().filter(|number| *number != 0) else {
            pirqs::unmap(self.pirqs, pirq).map_err(Refusal::Xen)?;
            return Err(Refusal::Unspeakable { pirq: pirq.0 });
        };
        ledger::set_mapped(self.ledger, slot, Some((number, entry)));
        Ok(number)
    }

    /// Everything is mapped: switches it on.
    fn finish(&self, held: Held) -> Result<(), Refusal> {
        self.switch_on(held)?;
        Held {
            phase: Phase::Enabled,
            ..held
        }
        .write(self.ledger);
        Ok(())
    }

    fn undo_on_error<T>(
        &self,
        held: Held,
        attempt: impl FnOnce() -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        attempt().inspect_err(|_| {
            // What cannot be undone stays in the ledger, for the next operation to undo; the first
            // error is the one to tell.
            let _ = self.undo(held);
        })
    }

    /// Switches off and unmaps all that the ledger names. Goes on past errors, to undo as much as
    /// can be; the ledger keeps what could not be.
    fn undo(&self, held: Held) -> Result<(), CleanupError> {
        Held {
            phase: Phase::Undoing,
            ..held
        }
        .write(self.ledger);
        let off = gone_is_off(self.switch_off(held.kind));
        let mut unmapped = Ok(());
        for slot in 0..usize::from(held.count).min(MAX_VECTORS) {
            let Some(pirq) = ledger::mapped(self.ledger, slot) else {
                continue;
            };
            match pirqs::unmap(self.pirqs, pirq) {
                Ok(_) => ledger::set_mapped(self.ledger, slot, None),
                Err(error) => unmapped = Err(CleanupError::Xen(error)),
            }
        }
        unmapped?;
        off.map_err(CleanupError::Config)?;
        if held.intx {
            gone_is_off(self.set_intx_disable(false)).map_err(CleanupError::Config)?;
        }
        ledger::clear(self.ledger);
        Ok(())
    }

    /// Sets the enable bit, by a write of the whole control word: Xen lets dom0 write nothing else
    /// of these capabilities.
    fn switch_on(&self, held: Held) -> Result<(), AccessError> {
        let Some(register) = self.control(held.kind) else {
            return Ok(());
        };
        let control = self.read(register)?;
        if control == NO_ANSWER {
            return Err(AccessError::Gone);
        }
        self.set_intx_disable(true)?;
        let control = match held.kind {
            Kind::Msi => msi::with_vectors(control, held.count) | msi::control::ENABLE,
            Kind::MsiX => control & !msix::control::FUNCTION_MASK | msix::control::ENABLE,
        };
        self.write(register, control)
    }

    /// Clears the enable bit, whoever set it.
    fn switch_off(&self, kind: Kind) -> Result<(), AccessError> {
        let Some(register) = self.control(kind) else {
            return Ok(());
        };
        let control = self.read(register)?;
        let enable = enable_bit(kind);
        if control & enable == 0 || control == NO_ANSWER {
            return Ok(());
        }
        self.write(register, control & !enable)
    }

    fn is_on(&self, kind: Kind) -> Result<bool, AccessError> {
        let Some(register) = self.control(kind) else {
            return Ok(false);
        };
        let control = self.read(register)?;
        if control == NO_ANSWER {
            return Err(AccessError::Gone);
        }
        Ok(control & enable_bit(kind) != 0)
    }

    fn set_intx_disable(&self, set: bool) -> Result<(), AccessError> {
        let value = self.read(header::COMMAND.offset)?;
        if value == NO_ANSWER {
            return Err(AccessError::Gone);
        }
        if (value & command::INTX_DISABLE != 0) == set {
            return Ok(());
        }
        self.write(header::COMMAND.offset, value ^ command::INTX_DISABLE)
    }

    /// Offset of the control word.
    fn control(&self, kind: Kind) -> Option<u16> {
        match kind {
            Kind::Msi => self
                .interrupts
                .msi
                .map(|msi| msi.offset.wrapping_add(msi::CONTROL.offset)),
            Kind::MsiX => self
                .interrupts
                .msix?
                .ok()
                .map(|msix| msix.offset.wrapping_add(msix::CONTROL.offset)),
        }
    }

    fn read(&self, offset: u16) -> Result<u16, AccessError> {
        let [low, high, ..] = self.config.read(offset, Width::Two)?.to_le_bytes();
        Ok(u16::from_le_bytes([low, high]))
    }

    fn write(&self, offset: u16, value: u16) -> Result<(), AccessError> {
        self.config.write(offset, Width::Two, u32::from(value))
    }
}

/// A device that is gone has nothing on.
fn gone_is_off(result: Result<(), AccessError>) -> Result<(), AccessError> {
    match result {
        Err(AccessError::Gone) => Ok(()),
        other => other,
    }
}

fn enable_bit(kind: Kind) -> u16 {
    match kind {
        Kind::Msi => msi::control::ENABLE,
        Kind::MsiX => msix::control::ENABLE,
    }
}

/// Checks the entries that a guest asks for, and counts them.
fn check_entries(entries: &[MsixEntry], msix: MsiX) -> Result<u16, Refusal> {
    let table = msix.vectors;
    let count = u16::try_from(entries.len()).unwrap_or(u16::MAX);
    if count > table {
        return Err(Refusal::TableTooShort { count, table });
    }
    let mut seen = [0u64; 32];
    for MsixEntry { entry, .. } in entries {
        let bit = 1u64.wrapping_shl(u32::from(entry & 63));
        match seen.get_mut(usize::from(entry >> 6)) {
            Some(word) if *entry < table && *word & bit == 0 => *word |= bit,
            _ => return Err(Refusal::Entries { table }),
        }
    }
    if entries.is_empty() {
        return Err(Refusal::Entries { table });
    }
    Ok(count)
}
