//! Hiding devices as the configuration says: at start, and when it is read again.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use conf_space::address::Bdf;
use conf_space::selector::{self, DeviceNames};
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
            hide_at_start(&config, &devices);
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

/// Hides, on a thread of its own, what `hide` names now and did not before. What it does not name any more stays hidden: a guest may have it, or
/// be about to get it.
pub fn follow(before: Arc<Config>, now: Arc<Config>, devices: Arc<Devices>) {
    let work = move || {
        tell_of_unlisted(&before, &now, &devices);
        hide_listed(&now, Some(&before), &devices);
    };
    if let Err(error) = thread::Builder::new().name("hide".into()).spawn(work) {
        error!(
            "configuration: what hide names newly is not hidden, as no thread can be started ({error}); try 'pciback hide' when memory is free again"
        );
    }
}

fn tell_of_unlisted(before: &Config, now: &Config, devices: &Devices) {
    for device in devices.list() {
        let (bdf, names) = (device.bdf, device.description.names());
        if !is_listed(before, &names) || is_listed(now, &names) {
            continue;
        }
        let keeps_it = match device.owner() {
            Some(domain) => format!(", and domain {domain} keeps it"),
            None => String::new(),
        };
        info!(
            "configuration: hide does not name {bdf} any more. It stays hidden{keeps_it}: to give it back to dom0, pciback unhide {bdf}"
        );
    }
}

fn is_listed(config: &Config, device: &DeviceNames) -> bool {
    let mut entries = config.hide.iter().flat_map(|list| selector::parse(list));
    entries.any(|entry| entry.is_ok_and(|selector| selector.matches(device)))
}

fn hide_at_start(config: &Config, devices: &Arc<Devices>) {
    let existing = devices.names().unwrap_or_default();
    for warning in left_out(config, &existing) {
        warn!("configuration: {warning}");
    }
    hide_listed(config, None, devices);
}

/// Hides what `config` names and `before` did not. Each device on its own: one that fails, or an entry that makes no sense, is logged and the
/// others are hidden.
fn hide_listed(config: &Config, before: Option<&Config>, devices: &Arc<Devices>) {
    let existing = devices.names().unwrap_or_else(|error| {
        error!("{}", chain(&error));
        Vec::new()
    });
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
            if before.is_some_and(|before| is_listed(before, device)) {
                continue;
            }
            // Of an IOMMU group either all are named, or the others are in dom0's hands.
            let group = devices.bus().together(device.bdf).unwrap_or_default();
            let named = |bdf: &Bdf| {
                let mut known = existing.iter();
                known.any(|device| device.bdf == *bdf && is_listed(config, device))
            };
            let hidden = if group.len() > 1 && group.iter().all(named) {
                devices.hide_group(device.bdf, false).map(drop)
            } else {
                let alone = devices.hide(device.bdf, false, Quarantine::Ours);
                alone.map(drop)
            };
            match hidden {
                Ok(()) => info!("{} is hidden", device.bdf),
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
