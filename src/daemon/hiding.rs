//! Hiding devices at start, as the configuration says.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use conf_space::selector;
use log::{error, info, warn};
use mio::Waker;

use super::reload::left_out;
use crate::config::Config;
use crate::host::devices::{Devices, Quarantine};
use crate::text::chain;

/// Hides on a thread of its own, since a reset may take a minute. At its end sets the flag that is returned, and wakes the daemon.
///
/// # Errors
/// When there is no memory for a thread.
pub fn start(
    config: Arc<Config>,
    devices: Arc<Devices>,
    waker: Arc<Waker>,
) -> io::Result<Arc<AtomicBool>> {
    let done = Arc::new(AtomicBool::new(false));
    let work = {
        let done = Arc::clone(&done);
        move || {
            hide(&config, &devices);
            take_up_reserved(&devices);
            done.store(true, Ordering::Release);
            if let Err(error) = waker.wake() {
                error!("cannot wake the daemon: {error}");
            }
        }
    };
    thread::Builder::new().name("hide".into()).spawn(work)?;
    Ok(done)
}

/// Each device on its own: one that fails, or an entry that makes no sense, is logged and the others are hidden.
fn hide(config: &Config, devices: &Arc<Devices>) {
    let existing = devices.names().unwrap_or_else(|error| {
        error!("{}", chain(&error));
        Vec::new()
    });
    for warning in left_out(config, &existing) {
        warn!("configuration: {warning}");
    }
    for entry in config.hide.iter().flat_map(|list| selector::parse(list)) {
        let selector = match entry {
            Ok(selector) => selector,
            Err(error) => {
                error!("configuration, hide: {}", chain(&error));
                continue;
            }
        };
        let mut any = false;
        for device in existing.iter().filter(|device| selector.matches(device)) {
            any = true;
            match devices.hide(device.bdf, false, Quarantine::Ours) {
                Ok(_) => info!("{} is hidden", device.bdf),
                Err(error) => error!("configuration, hide: {}", chain(&error)),
            }
        }
        if !any {
            error!(
                "configuration, hide: no device matches {selector}; 'pciback list' shows those that are there"
            );
        }
    }
}

/// What else was reserved at boot: by the kernel's command line, or by an administrator's own rule.
fn take_up_reserved(devices: &Arc<Devices>) {
    let reserved = devices.reserved().unwrap_or_else(|error| {
        error!("{}", chain(&error));
        Vec::new()
    });
    for bdf in reserved {
        match devices.hide(bdf, false, Quarantine::Ours) {
            Ok(_) => info!("{bdf} is hidden, since it is reserved for pciback"),
            Err(error) => error!("{bdf} is reserved for pciback: {}", chain(&error)),
        }
    }
}
