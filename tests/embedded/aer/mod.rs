//! Errors that devices report, and guests that recover from them, or do not.

mod counters;
mod failure;
mod recovery;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use conf_space::registers::error_reporting;
use conf_space::{Bdf, Width};
use pcibackd::config::Config;
use pcibackd::host::errors::Severity;
use pcibackd::host::sim::NVME;
use pcibackd::session::aer::recovery::{Failure, Outcome, Recovery, State};
use tempfile::TempDir;
use xenbus::pciif::AerCommand::{self, Resume, SlotReset};
use xenbus::pciif::{AerResult, ChannelState};
use xenbus::sim::{AerRequest, Frontend, MachineOptions};
use xenbus::{DomId, PciDevice};

use crate::house::{House, LONG, at, until};

const FIRST: PciDevice = at(0, 0);

/// A house whose policy leaves files behind instead of running xl.
struct Setup {
    house: House,
    traces: TempDir,
}

impl Setup {
    fn new(hidden: &[Bdf], aer: &str) -> Self {
        let traces = tempfile::tempdir().unwrap();
        let path = traces.path().display();
        let file = traces.path().join("pcibackd.toml");
        let text = format!(
            "[defaults]\naer = {{ {aer} }}\n[commands]\ndetach = [\"touch\", \"{path}/detach-{{domain}}-{{device}}\"]\n\
             kill = [\"touch\", \"{path}/kill-{{domain}}\"]\n"
        );
        fs::write(&file, text).unwrap();
        let config = Config::load(Some(&file)).unwrap();
        let options = MachineOptions {
            toolstack_timeout: Duration::from_secs(2),
            ..MachineOptions::default()
        };
        let house = House::with(config, options, hidden);
        Self { house, traces }
    }

    fn detached(&self, domain: DomId, bdf: Bdf) -> PathBuf {
        self.traces.path().join(format!("detach-{domain}-{bdf}"))
    }

    fn until_detached(&self, domain: DomId, bdf: Bdf) {
        let file = self.detached(domain, bdf);
        until("the policy's command has run", || file.exists());
    }

    /// No command has run.
    fn is_untouched(&self) -> bool {
        let only = |path: &Path| path.file_name().unwrap() == "pcibackd.toml";
        let mut files = fs::read_dir(self.traces.path()).unwrap();
        files.all(|file| only(&file.unwrap().path()))
    }

    fn report(&self, severity: Severity) {
        self.house.bus.report_error(NVME, severity);
    }

    fn recovery(&self, bdf: Bdf) -> Recovery {
        Recovery::from_bits(self.house.record(bdf).errors().recovery())
    }

    fn until_recovered(&self, bdf: Bdf) {
        until("it has recovered", || {
            let recovery = self.recovery(bdf);
            recovery.is_quiet() && recovery.outcome == Outcome::Recovered
        });
    }

    fn until_failed(&self, bdf: Bdf, failure: Failure) {
        until(format!("{failure:?}"), || {
            self.recovery(bdf).state == State::Failed(failure)
        });
    }

    fn logged_errors(&self) -> u32 {
        let register = &error_reporting::UNCORRECTABLE_STATUS;
        let config = self.house.config(NVME);
        config.read(0x100 + register.offset, Width::Four).unwrap()
    }
}

/// With a guest whose NVMe drive is at work.
fn working(aer: &str) -> (Setup, DomId, Frontend) {
    let setup = Setup::new(&[NVME], aer);
    let (domain, mut frontend) = setup.house.boot(&[NVME]);
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0, 1]).unwrap();
    (setup, domain, frontend)
}

#[track_caller]
fn expect(frontend: &mut Frontend, command: AerCommand, state: ChannelState) {
    let request = frontend.next_aer(LONG).unwrap();
    let expected = AerRequest {
        command: Some(command),
        state: state as i32,
        function: FIRST,
    };
    assert_eq!(request, Some(expected));
}

#[track_caller]
fn takes_interrupts(setup: &Setup, frontend: &Frontend) {
    for vector in [0, 1] {
        assert!(setup.house.bus.raise_interrupt(NVME, vector));
        assert!(
            frontend
                .wait_for_interrupt(FIRST, vector.into(), LONG)
                .unwrap()
        );
    }
}

fn reset_and_resume(setup: &Setup, frontend: &mut Frontend) {
    frontend.answer_aer(AerResult::NeedReset).unwrap();
    expect(frontend, SlotReset, ChannelState::Normal);
    takes_interrupts(setup, frontend);
    frontend.answer_aer(AerResult::Recovered).unwrap();
    expect(frontend, Resume, ChannelState::Normal);
    frontend.answer_aer(AerResult::None).unwrap();
    setup.until_recovered(NVME);
}
