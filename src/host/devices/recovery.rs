//! What takes long in the recovery of a guest's device from an error: resets, by the kernel and by us.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use conf_space::registers::header;
use conf_space::{AccessError, ConfigSpace};
use log::{error, info, warn};
use xenbus::DomId;

use super::{Device, Devices};
use crate::host::config_state;
use crate::host::errors::{ErrorReport, Severity, registers};
use crate::host::record::Phase;
use crate::text::chain;

/// The kernel reports a fatal error just before it resets the link. Where it does not begin within this time it has nothing to reset.
const UNTIL_RESET_BEGINS: Duration = Duration::from_secs(2);
/// After a reset the kernel itself waits for the device up to a minute, and holds up whoever looks at it. This is for what comes on top.
const UNTIL_BACK: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(10);
/// Where the kernel's first way of resetting the link fails, it tries the other at once. It lets go of the devices in between, but not for as
/// long as this.
const BETWEEN_RESETS: Duration = Duration::from_millis(100);
const MOST_RESETS: usize = 3;

impl Devices {
    /// Passes a report on: to the sessions of the guests whose devices it concerns. Devices that no guest has are made ready again after a
    /// reset of their link.
    pub fn report_error(self: &Arc<Self>, report: ErrorReport) {
        let ports = |bdf| self.bus().ports_above(bdf).unwrap_or_default();
        let ports_of_source = ports(report.source);
        let mut wake = false;
        for device in self.list() {
            let bdf = device.bdf;
            if !report.concerns(bdf, &ports(bdf), &ports_of_source) {
                continue;
            }
            device.record.errors().count(report.severity);
            if device.record.phase() == Some(Phase::Assigned) {
                device.record.errors().report(report.severity);
                wake = true;
            } else if report.severity == Severity::Fatal {
                self.make_ready_again(&device);
            }
        }
        if wake {
            self.wake();
        }
    }

    /// Waits on a thread of its own until the kernel has reset the link above a device of `domain` and the device is back, and calls `done`
    /// with whether it is. `command` is what is on in the command register before the reset.
    pub fn await_link_reset(
        self: &Arc<Self>,
        device: &Arc<Device>,
        domain: DomId,
        command: u16,
        done: impl FnOnce(bool) + Send + 'static,
    ) {
        let (bdf, device) = (device.bdf, Arc::clone(device));
        self.in_background(bdf, "settle", move |devices| {
            done(settle(&device, command, || device.is_held_by(domain)));
            devices.wake();
        });
    }

    /// Restores a device that no guest has once the kernel has reset its link. Nobody gets it meanwhile. It is not reset once more: where a
    /// reset makes the port above report an error, that would go on for ever.
    fn make_ready_again(self: &Arc<Self>, device: &Arc<Device>) {
        if !device.record.advance(Phase::Hidden, Phase::Releasing) {
            return;
        }
        let (bdf, device) = (device.bdf, Arc::clone(device));
        self.in_background(bdf, "settle", move |devices| {
            let command = config_state::saved_command(&device.record.config());
            let restored = devices.reset_held(&device, || {
                settle(&device, command, || true);
                device.clear_errors();
                Ok(())
            });
            if let Err(error) = restored {
                error!("{}", chain(&error));
            }
        });
    }

    /// Resets a device of `domain` on a thread of its own, because its guest's driver wants that, and calls `done` with whether it works.
    /// Nothing is restored.
    pub fn reset_for_guest(
        self: &Arc<Self>,
        device: &Arc<Device>,
        domain: DomId,
        done: impl FnOnce(bool) + Send + 'static,
    ) {
        let (bdf, device) = (device.bdf, Arc::clone(device));
        self.in_background(bdf, "reset", move |devices| {
            let works = {
                let _alone = device.alone();
                if !device.is_held_by(domain) {
                    // Taken from the guest meanwhile, and reset by whoever did.
                    return;
                }
                if let Err(error) = devices.reset_alone(&device, devices.settings(&device).reset) {
                    warn!(
                        "{bdf} is recovered without a reset, though its guest's driver asked for one: {}",
                        chain(&error)
                    );
                } else {
                    info!("{bdf} was reset for its guest's driver");
                }
                wait_for(UNTIL_BACK, || device.responds())
            };
            done(works);
            devices.wake();
        });
    }
}

impl Device {
    /// Clears the errors that it has logged. What goes wrong is logged.
    pub fn clear_errors(&self) {
        let size = self.description.identity.config_size;
        if let Err(error) = registers::clear(&*self.config, size) {
            warn!(
                "{}: its error registers cannot be cleared: {}",
                self.bdf,
                chain(&error)
            );
        }
    }
}

/// Waits until the kernel has reset the link above a device and is done with it, for as long as the device `is_wanted`. Returns whether it answers.
fn settle(device: &Device, command: u16, is_wanted: impl Fn() -> bool) -> bool {
    wait_for(UNTIL_RESET_BEGINS, || {
        was_reset(&*device.config, command) || !is_wanted()
    });
    let mut answers = false;
    for _ in 0..MOST_RESETS {
        thread::sleep(BETWEEN_RESETS);
        let begin = Instant::now();
        answers = wait_for(UNTIL_BACK, || device.responds() || !is_wanted());
        // A look at a device that is being reset takes until it has been. One that does not answer is given up.
        if !answers || begin.elapsed() < BETWEEN_RESETS {
            break;
        }
    }
    answers
}

/// Whether the device is being reset or has been: nothing is on of what was on in its command register. Other bits say nothing: the line is
/// off while a guest has MSI, for one. Nor does a device that is closed while it changes hands (EBUSY).
fn was_reset(config: &(impl ConfigSpace + ?Sized), command: u16) -> bool {
    let register = &header::COMMAND;
    match config.read(register.offset, register.width) {
        Ok(value) if value == register.width.mask() => true,
        Ok(value) => command != 0 && value & u32::from(command) == 0,
        Err(AccessError::Failed { errno: libc::EBUSY }) => false,
        Err(_) => true,
    }
}

fn wait_for(time: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if begin.elapsed() >= time {
            return false;
        }
        thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use conf_space::Width;
    use conf_space::registers::header::command;

    use super::*;

    /// What every read gives.
    struct Reads(Result<u32, AccessError>);

    impl ConfigSpace for Reads {
        fn read(&self, _offset: u16, _width: Width) -> Result<u32, AccessError> {
            self.0
        }

        fn write(&self, _offset: u16, _width: Width, _value: u32) -> Result<(), AccessError> {
            Ok(())
        }
    }

    #[test]
    fn a_device_that_changes_hands_is_not_taken_for_one_that_was_reset() {
        let before = command::MEMORY | command::BUS_MASTER;
        let is_reset = |reads| was_reset(&Reads(reads), before);
        let failed = |errno| Err(AccessError::Failed { errno });
        assert!(!is_reset(failed(libc::EBUSY)));
        assert!(!is_reset(Ok(u32::from(before))));
        for reads in [failed(libc::EIO), Err(AccessError::Gone), Ok(0), Ok(0xffff)] {
            assert!(is_reset(reads), "{reads:?}");
        }
    }
}
