//! Accesses to a device's configuration space through sysfs. Each is one operation of xen-pcifront, and so one round trip to the backend.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Offset of the command register, with the status register behind it (PCI Local Bus 3.0, 6.2). Nobody caches them.
const COMMAND: u64 = 0x04;
/// Offset of the vendor ID, with the device ID behind it.
const VENDOR: u64 = 0x00;

fn open(bdf: &str) -> Result<File, Box<dyn Error>> {
    let path = format!("/sys/bus/pci/devices/{bdf}/config");
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| format!("{path}: {error}").into())
}

fn read_dword(config: &File, offset: u64) -> std::io::Result<[u8; 4]> {
    let mut value = [0; 4];
    config.read_exact_at(&mut value, offset)?;
    Ok(value)
}

/// Prints `read MEDIAN P99` and `write MEDIAN P99`, in microseconds. What is written is what was read: nothing changes.
pub fn bench(bdf: &str, count: usize) -> Result<(), Box<dyn Error>> {
    let config = open(bdf)?;
    let [low, high, ..] = read_dword(&config, COMMAND)?;
    print(
        "read",
        timed(count, || read_dword(&config, COMMAND).map(drop))?,
    )?;
    print(
        "write",
        timed(count, || config.write_all_at(&[low, high], COMMAND))?,
    )
}

/// Times so many accesses, one by one.
pub fn timed<E>(
    count: usize,
    mut access: impl FnMut() -> Result<(), E>,
) -> Result<Vec<Duration>, E> {
    // The first ones pay for what is not there yet: code not translated, caches cold.
    for _ in 0..100 {
        access()?;
    }
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        access()?;
        times.push(begin.elapsed());
    }
    Ok(times)
}

/// Prints `WHAT MEDIAN P99`, in microseconds.
pub fn print(what: &str, mut times: Vec<Duration>) -> Result<(), Box<dyn Error>> {
    times.sort_unstable();
    let at = |percent: usize| {
        let index = times.len().saturating_mul(percent).checked_div(100)?;
        times.get(index).map(|time| time.as_secs_f64() * 1e6)
    };
    let (Some(median), Some(p99)) = (at(50), at(99)) else {
        return Err("nothing was measured".into());
    };
    println!("{what} {median:.3} {p99:.3}");
    Ok(())
}

/// Prints `reading` when it begins, and `reads N, M wrong, the longest took T ms` when it ends, which is when there is a file `stop`. A read
/// that the backend does not answer in time comes back as all ones.
pub fn reads(bdf: &str, stop: &Path) -> Result<(), Box<dyn Error>> {
    let config = open(bdf)?;
    let expected = read_dword(&config, VENDOR)?;
    println!("reading");
    let (mut count, mut wrong, mut longest) = (0u64, 0u64, Duration::ZERO);
    while !stop.exists() {
        let begin = Instant::now();
        let value = read_dword(&config, VENDOR);
        longest = longest.max(begin.elapsed());
        count = count.saturating_add(1);
        if !value.is_ok_and(|value| value == expected) {
            wrong = wrong.saturating_add(1);
        }
    }
    println!(
        "reads {count}, {wrong} wrong, the longest took {} ms",
        longest.as_millis()
    );
    Ok(())
}
