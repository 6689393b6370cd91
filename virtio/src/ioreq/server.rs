//! The server of one guest: takes requests from the page, has them carried out, and answers.
//!
//! There is one rule above all others: every request is answered, on every path. A CPU that is not
//! answered hangs for ever, and nobody can tell why.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use xenbus::device_model::{IoRange, IoreqServerId};
use xenbus::ioreq::{IoreqPage, SLOTS, State};
use xenbus::{DomId, EventPort, Xen, XenError};

use super::ledger::Ledger;
use super::ranges::{join, subtract};
use super::request::{Access, BadRequest, Request};
use super::spaces::{Hold, Spaces};
use super::target::Placed;
use crate::inspect::DeviceView;
use crate::memory::GuestRam;

/// A server that cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Xen refused something.
    #[error("the IOREQ server of domain {domain} cannot work")]
    Xen {
        /// The guest.
        domain: DomId,
        /// What was refused.
        #[source]
        source: XenError,
    },
    /// An event channel is beyond use.
    #[error("an event channel of domain {domain}'s CPUs is beyond use")]
    Channel {
        /// The guest.
        domain: DomId,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Something that is the guest's fault, or the configuration's, to be told about. The guest goes on.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A request that Xen does not make.
    #[error("it was asked for {0}")]
    Request(#[from] BadRequest),
    /// An instruction between a device and memory that is not there.
    #[error("an instruction moves data between a device and memory that is not there")]
    Fault,
    /// A range that a device should answer cannot be had.
    #[error("a device cannot be reached where the guest has put it")]
    Range(#[from] XenError),
    /// There are more than a server can have.
    #[error("its devices are at more places than can be kept in mind: the last are not reached")]
    TooManyRanges,
}

/// One guest's server. Dropping it leaves it to the next process.
#[derive(Debug)]
pub struct Server {
    xen: Arc<dyn Xen>,
    domain: DomId,
    id: IoreqServerId,
    page: IoreqPage,
    /// One for each CPU.
    channels: Vec<Channel>,
    spaces: Spaces,
    memory: Arc<GuestRam>,
    ledger: Ledger,
    /// What Xen has for the server, joined.
    claimed: Vec<IoRange>,
    /// The last problem that nobody has asked for yet.
    problem: Option<Problem>,
}

#[derive(Debug)]
struct Channel {
    port: Box<dyn EventPort>,
    masked: bool,
    /// Its request is begun, and a target holds the CPU.
    held: Option<(Access, Hold)>,
}

impl Server {
    /// Takes up the server that stands in the ledger, or makes one. It answers nothing before
    /// [`Server::place`].
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn open(
        xen: Arc<dyn Xen>,
        domain: DomId,
        memory: Arc<GuestRam>,
        ledger: Ledger,
    ) -> Result<Self, ServerError> {
        let failed = |source| ServerError::Xen { domain, source };
        let taken_up = ledger.server().map(|id| (id, connect(&*xen, domain, id)));
        let (id, (page, channels)) = match taken_up {
            Some((id, Ok(connected))) => (id, connected),
            // Killed between having it destroyed and writing that down.
            Some((_, Err(error))) if error.errno() == Some(libc::ENOENT) => {
                // It cannot be too long: it is empty.
                let _ = ledger.set_ranges(&[]);
                create(&*xen, domain, &ledger).map_err(failed)?
            }
            Some((_, Err(error))) => return Err(failed(error)),
            None => create(&*xen, domain, &ledger).map_err(failed)?,
        };
        Ok(Self {
            channels,
            xen,
            domain,
            id,
            page,
            spaces: Spaces::default(),
            memory,
            ledger,
            claimed: Vec::new(),
            problem: None,
        })
    }

    /// Its targets are to be these: for a server that is taken up the same as before, in the state in
    /// which they were. Once.
    ///
    /// Each CPU is to be served right away: it may have been waiting.
    pub fn place(&mut self, targets: Vec<Placed>) {
        for target in targets {
            self.spaces.add(target);
        }
        self.settle();
        self.claim();
    }

    /// Has its targets stop for good, so that others can go on in their place. True: nothing of them
    /// touches the guest's memory any more. To be asked again until then.
    pub fn halt(&mut self) -> bool {
        self.spaces.halt()
    }

    /// What there is to see of its devices.
    pub fn inspect(&self) -> Vec<DeviceView> {
        self.spaces.inspect()
    }

    /// Which one it is.
    pub fn id(&self) -> IoreqServerId {
        self.id
    }

    /// Ends it for good. CPUs that wait for it read anything.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn destroy(self) -> Result<(), ServerError> {
        let Self { xen, domain, .. } = self;
        let destroyed = xen.destroy_ioreq_server(domain, self.id);
        destroyed.map_err(|source| ServerError::Xen { domain, source })?;
        let _ = self.ledger.set_ranges(&[]);
        self.ledger.set_server(None);
        Ok(())
    }

    /// For each CPU what becomes readable when it asks for something.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.channels.iter().map(|channel| channel.port.fd())
    }

    /// What went wrong since this was last asked; of several things the last.
    pub fn take_problem(&mut self) -> Option<Problem> {
        self.problem.take()
    }

    /// Whether a CPU waits, and is not held.
    pub fn pending(&self) -> bool {
        let mut slots = self.channels.iter().enumerate();
        slots.any(|(slot, channel)| channel.held.is_none() && waits(self.page.state(slot)))
    }

    /// Answers a CPU, if it asks for something. True: it did.
    ///
    /// # Errors
    /// [`ServerError::Channel`].
    pub fn serve(&mut self, vcpu: usize) -> Result<bool, ServerError> {
        let domain = self.domain;
        let failed = |source| ServerError::Channel { domain, source };
        let Some(channel) = self.channels.get_mut(vcpu) else {
            return Ok(false);
        };
        channel.masked |= channel.port.take().map_err(failed)?;
        let event = channel.masked;
        let state = self.page.state(vcpu);
        let asked = channel.held.is_none() && waits(state);
        let answered = asked && self.answer(vcpu);
        let Some(channel) = self.channels.get_mut(vcpu) else {
            return Ok(asked);
        };
        // One that was answered already has not heard of it, if whoever did so was killed at that.
        if answered || (event && state == Some(State::Answered)) {
            channel.port.notify().map_err(failed)?;
        }
        if channel.masked {
            channel.masked = false;
            channel.port.unmask().map_err(failed)?;
        }
        Ok(asked)
    }

    /// Whether a target holds a CPU: [`Server::go_on`] is to be called every now and then.
    pub fn is_holding(&self) -> bool {
        self.channels.iter().any(|channel| channel.held.is_some())
    }

    /// Answers those CPUs that were held and may go on.
    ///
    /// # Errors
    /// [`ServerError::Channel`].
    pub fn go_on(&mut self) -> Result<(), ServerError> {
        for slot in 0..self.channels.len() {
            let channel = self.channels.get_mut(slot);
            let Some((access, hold)) = channel.and_then(|channel| channel.held) else {
                continue;
            };
            if self.spaces.holds(&hold) {
                continue;
            }
            let Some(data) = self.access(slot, access, hold.next) else {
                continue;
            };
            self.finish(slot, data);
            if let Some(channel) = self.channels.get(slot) {
                let domain = self.domain;
                let notified = channel.port.notify();
                notified.map_err(|source| ServerError::Channel { domain, source })?;
            }
        }
        Ok(())
    }

    /// Answers every CPU that asks for something. True: one did.
    ///
    /// # Errors
    /// [`ServerError::Channel`].
    pub fn serve_all(&mut self) -> Result<bool, ServerError> {
        let mut any = false;
        for vcpu in 0..self.channels.len() {
            any |= self.serve(vcpu)?;
        }
        Ok(any)
    }

    /// Carries out what stands in a slot, and answers. There is no way out of here without that, but that a target holds the CPU: false. Then
    /// [`Server::go_on`] answers.
    fn answer(&mut self, slot: usize) -> bool {
        self.page.set_state(slot, State::InProcess);
        let data = match Request::decode(&self.page.fetch(slot)) {
            Ok(Request::Access(access)) => self.access(slot, access, 0),
            Ok(Request::Invalidate) => {
                self.memory.invalidate();
                Some(0)
            }
            Ok(Request::TimeOffset) => Some(0),
            Err(why) => {
                self.problem = Some(why.into());
                Some(u64::MAX)
            }
        };
        if let Some(data) = data {
            self.finish(slot, data);
        }
        data.is_some()
    }

    fn finish(&mut self, slot: usize, data: u64) {
        self.page.set_data(slot, data);
        self.page.set_state(slot, State::Answered);
    }

    /// Carries an access out, from its element `first` on. `None`: a target holds the CPU.
    fn access(&mut self, slot: usize, access: Access, first: u32) -> Option<u64> {
        let outcome = self.spaces.access(&access, first, &self.memory.view());
        if outcome.fault {
            self.problem = Some(Problem::Fault);
        }
        if outcome.configured {
            self.claim();
        }
        if let Some(channel) = self.channels.get_mut(slot) {
            channel.held = outcome.held.map(|hold| (access, hold));
        }
        outcome.held.is_none().then_some(outcome.data)
    }

    /// Takes what the last process has left: of the ranges in the ledger Xen may have each or not,
    /// for that process was killed between any two calls. Those that are not wanted any more are given
    /// back; a wanted one is never out of our hands, for the guest runs meanwhile.
    fn settle(&mut self) {
        let mut wanted: Vec<_> = self.spaces.claimed().collect();
        join(&mut wanted);
        let Self {
            xen, domain, id, ..
        } = self;
        let mut kept = Vec::new();
        for range in self.ledger.ranges() {
            let mut unwanted = Vec::new();
            subtract(range, &wanted, &mut unwanted);
            join(&mut unwanted);
            subtract(range, &unwanted, &mut kept);
            for range in unwanted {
                // It may be Xen's already.
                let _ = xen.unmap_io_range(*domain, *id, range);
            }
        }
        kept.retain(|range| match xen.map_io_range(*domain, *id, *range) {
            Err(error) if error.errno() != Some(libc::EEXIST) => {
                self.problem = Some(error.into());
                false
            }
            _ => true,
        });
        join(&mut kept);
        // Were it too long, the old list would do: it has these ranges, too.
        let _ = self.ledger.set_ranges(&kept);
        self.claimed = kept;
    }

    /// Has Xen send us what our targets answer now, and nothing else.
    fn claim(&mut self) {
        let mut wanted: Vec<_> = self.spaces.claimed().collect();
        join(&mut wanted);
        if wanted == self.claimed {
            return;
        }
        let (mut new, mut old) = (Vec::new(), Vec::new());
        for range in &wanted {
            subtract(*range, &self.claimed, &mut new);
        }
        for range in &self.claimed {
            subtract(*range, &wanted, &mut old);
        }
        let all: Vec<_> = self.claimed.iter().chain(&new).copied().collect();
        if !self.ledger.set_ranges(&all) {
            self.problem = Some(Problem::TooManyRanges);
            return;
        }
        let Self {
            xen, domain, id, ..
        } = self;
        let mut claimed = wanted;
        for range in new {
            if let Err(error) = xen.map_io_range(*domain, *id, range) {
                self.problem = Some(error.into());
                claimed = without(&claimed, range);
            }
        }
        for range in old {
            if let Err(error) = xen.unmap_io_range(*domain, *id, range) {
                self.problem = Some(error.into());
            }
        }
        // As above.
        let _ = self.ledger.set_ranges(&claimed);
        self.claimed = claimed;
    }
}

/// Makes a server, and connects to it.
fn create(
    xen: &dyn Xen,
    domain: DomId,
    ledger: &Ledger,
) -> Result<(IoreqServerId, (IoreqPage, Vec<Channel>)), XenError> {
    // Killed here it leaves a server that is disabled and claims nothing: no harm is done.
    let id = xen.create_ioreq_server(domain)?;
    ledger.set_server(Some(id));
    match connect(xen, domain, id) {
        Ok(connected) => Ok((id, connected)),
        Err(error) => {
            // Enabled without anybody to answer it would hang the guest at the next broadcast.
            let _ = xen.destroy_ioreq_server(domain, id);
            ledger.set_server(None);
            Err(error)
        }
    }
}

/// Maps a server's page, enables it, and binds to the CPUs' event channels.
fn connect(
    xen: &dyn Xen,
    domain: DomId,
    id: IoreqServerId,
) -> Result<(IoreqPage, Vec<Channel>), XenError> {
    let page = IoreqPage::new(xen.map_ioreq_page(domain, id)?);
    xen.set_ioreq_server_state(domain, id, true)?;
    let count = xen.vcpu_count(domain)?;
    let slots = 0..usize::try_from(count).unwrap_or(SLOTS).min(SLOTS);
    let channel = |slot| {
        let port = xen.bind_interdomain(domain, page.port(slot))?;
        Ok(Channel {
            port,
            masked: false,
            held: None,
        })
    };
    let channels: Result<_, XenError> = slots.map(channel).collect();
    Ok((page, channels?))
}

fn waits(state: Option<State>) -> bool {
    matches!(state, Some(State::Ready | State::InProcess))
}

fn without(ranges: &[IoRange], range: IoRange) -> Vec<IoRange> {
    let mut rest = Vec::new();
    for from in ranges {
        subtract(*from, &[range], &mut rest);
    }
    rest
}
