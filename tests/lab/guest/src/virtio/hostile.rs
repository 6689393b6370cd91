//! A driver that breaks the rules of a disk.

use std::error::Error;
use std::time::Duration;

use super::disk::{Device, Queue};
use super::memory::{ballooned, large_page};
use super::mistakes::{CHAINS, CHAINS_ELSEWHERE, SETUPS, SETUPS_ELSEWHERE};
use super::ring::Ring;
use super::storms::{Step, Storms};

/// Every mistake, each of which is to make the device need a reset, and then storms of them, each for `duration`. In between the device is to serve
/// honest requests.
pub fn break_rules(bdf: &str, duration: Duration) -> Result<(), Box<dyn Error>> {
    let memory = large_page()?;
    let mut device = Device::open(bdf, &memory)?;
    // Where no memory is: beyond all, the device's own registers, the guest's interrupt controller, a hole, what was given back to Xen.
    let nowhere = [
        1 << 40,
        !0xfff,
        device.address,
        0xfee0_0000,
        0xfe00_0000,
        ballooned()?,
    ];
    device.serve_honestly()?;

    let mut mistakes = 0u32;
    let mut one = |device: &Device<'_>,
                   name: &str,
                   setup: &dyn Fn(&mut Queue),
                   chain: &dyn Fn(&mut Ring<'_>)| {
        mistakes = mistakes.saturating_add(1);
        let done = device.make_mistake(setup, chain);
        done.map_err(|error| format!("{name}: {error}"))
    };
    for (name, setup) in SETUPS {
        one(&device, name, &setup, &|_| ())?;
    }
    device.serve_honestly()?;
    for (name, chain) in CHAINS {
        one(&device, name, &|_| (), &chain)?;
    }
    for address in nowhere {
        device.serve_honestly()?;
        for (name, setup) in SETUPS_ELSEWHERE {
            let name = format!("{name}, at {address:#x}");
            one(&device, &name, &|queue| setup(queue, address), &|_| ())?;
        }
        for (name, chain) in CHAINS_ELSEWHERE {
            let name = format!("{name}, at {address:#x}");
            one(&device, &name, &|_| (), &|ring| chain(ring, address))?;
        }
    }
    device.serve_honestly()?;
    println!("{mistakes} mistakes, and each made the device need a reset");

    let mut storms = Storms::new(nowhere);
    let mut storm = |name: &str, step: Step| {
        let count = storms.rage(&mut device, duration, step);
        count
            .map(|count| println!("{name}: {count}"))
            .map_err(|error| format!("{name}: {error}"))
    };
    storm("rings of noise", Storms::noise)?;
    storm("registers at random", Storms::registers)?;
    storm(
        "notifications of queues that are not there",
        Storms::notifications,
    )?;
    storm("resets in the middle of requests", Storms::resets)?;
    storm("the BAR elsewhere", Storms::moves)?;
    println!("it serves honest requests after all that");
    Ok(())
}
