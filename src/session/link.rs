//! The live connection to a frontend: its page and its event channel.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use msi::Vectors;
use xenbus::pciif::{AerCommand, AerOp, AerResult, ChannelState, SharedInfo};
use xenbus::{EventPort, PageMapping, PciDevice};

use super::exports::Exports;
use super::operation;
use super::spin::Spin;
use super::telemetry::Telemetry;
use crate::rate_limit::RateLimit;

/// After this long a frontend has given its operation up (Linux `xen-pcifront.c`: 2 s) and may have put another one into the page.
const FRONTEND_TIMEOUT: Duration = Duration::from_secs(2);

/// A frontend that keeps us busy is left for a moment after so many operations, to look at xenstore.
const OPERATIONS_IN_A_ROW: u32 = 256;

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Nothing more to do until the next event.
    Idle,
    /// More is waiting: come back after a look at everything else.
    More,
    /// The event channel stays masked until this time, as the guest sends events without reason.
    Throttled(Instant),
}

/// A page and an event channel. Dropping it unmaps and closes them.
#[derive(Debug)]
pub struct Link {
    page: SharedInfo,
    port: Box<dyn EventPort>,
    spin: Spin,
    /// Events for which there was nothing to do.
    spurious: RateLimit,
    /// An event was taken and the channel not unmasked yet.
    masked: bool,
    /// Operations were carried out since the last event that came without one. Their events may come yet, merged into one: an operation
    /// is often seen in the page before its event.
    event_due: bool,
    /// A step of recovery was asked for, and the answer not taken yet.
    aer_asked: bool,
}

impl Link {
    /// Takes up a connection. The first look at the page is to be made at once: an operation may be waiting.
    pub fn new(page: Box<dyn PageMapping>, port: Box<dyn EventPort>) -> Self {
        Self {
            page: SharedInfo::new(page),
            port,
            spin: Spin::default(),
            spurious: RateLimit::new(20, Duration::from_millis(50)),
            masked: false,
            event_due: false,
            aer_asked: false,
        }
    }

    /// Readable when the frontend has sent an event.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.port.fd()
    }

    /// Looks for an event and carries out what waits in the page, and what follows shortly after.
    ///
    /// # Errors
    /// Only when the event channel is beyond use.
    pub fn serve(
        &mut self,
        exports: &mut Exports,
        log_limit: &mut RateLimit,
        telemetry: &Telemetry,
    ) -> std::io::Result<Served> {
        self.masked |= self.port.take()?;
        let mut served = 0;
        while self.page.active() || (served > 0 && self.spin.wait_for(|| self.page.active())) {
            if served == OPERATIONS_IN_A_ROW {
                return Ok(Served::More);
            }
            self.serve_one(exports, log_limit, telemetry)?;
            self.event_due = true;
            served = served.saturating_add(1);
        }
        if !self.masked {
            return Ok(Served::Idle);
        }
        let reason = std::mem::take(&mut self.event_due) || self.aer_answered();
        let without_reason = served == 0 && !reason;
        if without_reason && !self.spurious.allow() {
            return Ok(Served::Throttled(self.spurious.next(Instant::now())));
        }
        self.masked = false;
        self.port.unmask()?;
        // Between the last look at the page and the unmasking an operation would have set the channel pending, which unmasking delivers.
        Ok(Served::Idle)
    }

    /// Whether the frontend says that it can recover from errors.
    pub fn handles_aer(&self) -> bool {
        self.page.frontend_handles_aer()
    }

    /// Asks the frontend to take a step of recovery for the function at a virtual address. One at a time.
    ///
    /// # Errors
    /// When the event channel is beyond use.
    pub fn ask_aer(
        &mut self,
        step: AerCommand,
        state: ChannelState,
        function: PciDevice,
    ) -> std::io::Result<()> {
        // By a daemon that was killed before it could write that down. To ask again would overwrite an answer that is being given.
        if !self.page.aer_pending() {
            self.page.post_aer(step, state, function);
        }
        self.aer_asked = true;
        self.port.notify()
    }

    /// Takes up what an earlier daemon has asked.
    ///
    /// # Errors
    /// As [`Link::ask_aer`].
    pub fn resume_aer(&mut self) -> std::io::Result<()> {
        self.aer_asked = true;
        self.port.notify()
    }

    /// The step that the frontend has yet to answer, as it lies in the page, whoever asked.
    pub fn pending_aer(&self) -> Option<AerOp> {
        self.page.pending_aer()
    }

    /// Whether a step was asked for and the answer not taken yet.
    pub fn aer_asked(&self) -> bool {
        self.aer_asked
    }

    fn aer_answered(&self) -> bool {
        self.aer_asked && !self.page.aer_pending()
    }

    /// Takes the frontend's answer, once it is there.
    pub fn take_aer_answer(&mut self) -> Option<AerResult> {
        let answer = self
            .aer_asked
            .then(|| self.page.take_aer_result())
            .flatten();
        self.aer_asked &= answer.is_none();
        answer
    }

    /// Waits for the answer no longer.
    pub fn withdraw_aer(&mut self) {
        self.page.withdraw_aer();
        self.aer_asked = false;
    }

    fn serve_one(
        &mut self,
        exports: &mut Exports,
        log_limit: &mut RateLimit,
        telemetry: &Telemetry,
    ) -> std::io::Result<()> {
        let fetched = Instant::now();
        self.spin.found(fetched);
        let op = self.page.fetch();
        let reply = operation::serve(exports, &op, log_limit);
        // A late reply would answer another request than it was made for.
        let took = fetched.elapsed();
        if took >= FRONTEND_TIMEOUT || !self.page.active() || !self.page.header_matches(&op) {
            telemetry.record(&op, &reply, took);
            return Ok(());
        }
        self.page.publish(
            reply.error,
            reply.value,
            reply.vectors.as_ref().map(Vectors::as_slice),
        );
        self.port.notify()?;
        // The guest goes on meanwhile.
        let answered = Instant::now();
        self.spin.answered(answered);
        telemetry.record(&op, &reply, answered.saturating_duration_since(fetched));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use conf_space::topology::TopologyKind;
    use xenbus::pciif::{self, PciOp};
    use xenbus::sim::{DomainKind, GuestPlatform, GuestPort, Machine};
    use xenbus::{DomId, Xen};

    use super::*;
    use crate::host::devices::Devices;
    use crate::host::sim::SimBus;

    struct Setup {
        link: Link,
        exports: Exports,
        page: pciif::Frontend,
        port: GuestPort,
        _run_dir: tempfile::TempDir,
    }

    fn setup() -> Setup {
        let run_dir = tempfile::tempdir().unwrap();
        let machine = Machine::new(run_dir.path()).unwrap();
        let xen: Arc<dyn Xen> = Arc::new(machine.clone());
        let bus = SimBus::new(&machine);
        let devices = Devices::open(
            bus,
            Arc::clone(&xen),
            Arc::default(),
            run_dir.path().join("devices"),
        )
        .unwrap();
        let domain = machine.create_domain("guest", DomainKind::Pv).unwrap();
        let guest = machine.guest(domain);
        let granted = guest.grant_page(DomId::DOM0).unwrap();
        let port = guest.alloc_unbound(DomId::DOM0).unwrap();
        let mut link = Link::new(
            xen.map_page(domain, granted.reference).unwrap(),
            xen.bind_interdomain(domain, port.number()).unwrap(),
        );
        let mut exports = Exports::new(domain, TopologyKind::Vpci, devices, xen);
        // Binding sets the port pending once.
        let mut limit = RateLimit::new(0, Duration::MAX);
        link.serve(&mut exports, &mut limit, &Telemetry::default())
            .unwrap();
        Setup {
            link,
            exports,
            page: pciif::Frontend::new(Box::new(granted.page)),
            port,
            _run_dir: run_dir,
        }
    }

    impl Setup {
        fn serve(&mut self) -> Served {
            let mut limit = RateLimit::new(0, Duration::MAX);
            let telemetry = Telemetry::default();
            let served = self.link.serve(&mut self.exports, &mut limit, &telemetry);
            served.unwrap()
        }
    }

    #[test]
    fn a_guest_whose_operations_are_seen_before_their_events_is_not_throttled() {
        let mut setup = setup();
        for _ in 0..100 {
            setup.page.submit(&PciOp::default());
            assert_eq!(setup.serve(), Served::Idle);
            assert!(!setup.page.pending());
            setup.port.notify().unwrap();
            assert_eq!(setup.serve(), Served::Idle);
        }
    }

    #[test]
    fn a_guest_that_sends_events_for_nothing_is_throttled_and_served_all_the_same() {
        let mut setup = setup();
        let throttled = (0..100).any(|_| {
            setup.port.notify().unwrap();
            matches!(setup.serve(), Served::Throttled(_))
        });
        assert!(throttled);
        setup.page.submit(&PciOp::default());
        setup.serve();
        assert!(!setup.page.pending());
    }
}
