//! What the lab's guests run: measured accesses, and drivers of devices that misbehave.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

mod config;
mod device;
mod disk;
mod frontend;
mod hammer;
mod memory;
mod misbehave;
mod random;
mod stream;
mod virtio;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "usage:
  lab-guest bench BDF COUNT      times COUNT 4-byte reads and 2-byte writes of the command register; prints median and 99th percentile
  lab-guest reads BDF FILE       reads the vendor and device ID until FILE exists; prints how often, how often wrong, and the longest wait
  lab-guest hammer DISK JOBS FILE  writes and reads the disk's first blocks, JOBS requests at a time, until FILE exists, and says whether all was right
  lab-guest disk DISK randread|read|write BYTES DEPTH SECONDS
                                 requests of so many bytes, DEPTH at a time; prints how many a second
  lab-guest stream ADDRESS:PORT send|receive SECONDS
                                 one TCP connection; prints how many MiB a second
  lab-guest deaf                 plays a PCI frontend that says it handles errors of devices, and answers nothing until it is killed
  lab-guest misbehave SECONDS    plays a PCI frontend, without the kernel's, that is hostile in every way it knows; SECONDS for each
  lab-guest legacy BDF           finds a virtio device's legacy registers the same through BAR 0, ports, and BAR 3, memory
  lab-guest legacy-copy BDF FROM TO COUNT
                                 copies sectors of a virtio disk, and to the standard output, by the registers in memory
  lab-guest break-rules BDF SECONDS
                                 drives a virtio disk in every wrong way it knows; SECONDS for each storm
  lab-guest drive DRIVER PLACE STEP...
                                 plays a driver of a device at vfio:BDF (VFIO, by itself) or RUN_DIR:DOMID (that guest of pcibackd's embedded Xen; RUN_DIR:DOMID:NUMBER:
                                 its device of that number, from 1).
                                 edu: identify, factorial, dma, intx, msi, stray (DMA where nothing is), bench, mapped, trapped (a figure),
                                 recover (as igb does), last (until the device goes);
                                 nvme: identify, write (and read) some blocks, first (MiB, to the standard output); igbvf: identify, msix, reset;
                                 igb: identify, msix, recover (from an error that it waits for), deaf (for 20 s), ports (I/O), asleep, last;
                                 xhci: msi (four vectors); rtl8139: ports (I/O, of all widths); vga: mode, draw, mapped;
                                 both, edu and nvme of one guest: work, lose (edu), find (it again); function, which is any: ids, answers, nopin,
                                 split (what is mapped is not MSI-X's), rom (to the standard output), sleep (D3hot), wake
  lab-guest look RUN_DIR DOMID memory|io ADDRESS WIDTH
                                 reads what a device of that guest of the embedded Xen has at an address, in hexadecimal figures
  lab-guest give RUN_DIR DOMID MIB
                                 gives the devices of that guest so much memory, which stays theirs
  lab-guest toolstack RUN_DIR create NAME BDF... | attach DOMID BDF | detach DOMID BDF | destroy DOMID
                                 plays a toolstack of pcibackd's embedded Xen; create prints DOMID";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Err(error) => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(error) = source {
                text = format!("{text}: {error}");
                source = error.source();
            }
            eprintln!("lab-guest: {text}");
            ExitCode::FAILURE
        }
    }
}

/// False when the arguments are none of the usage's.
fn run(arguments: &[&str]) -> Result<bool, Box<dyn Error>> {
    match arguments {
        ["bench", bdf, count] => config::bench(bdf, count.parse()?)?,
        ["reads", bdf, file] => config::reads(bdf, Path::new(file))?,
        ["hammer", disk, jobs, file] => hammer::hammer(disk, jobs.parse()?, Path::new(file))?,
        ["disk", disk, pattern, bytes, depth, seconds] => {
            let time = Duration::from_secs(seconds.parse()?);
            disk::bench(disk, pattern, bytes.parse()?, depth.parse()?, time)?;
        }
        ["stream", address, "send", seconds] => {
            stream::send(address, Duration::from_secs(seconds.parse()?))?;
        }
        ["stream", address, "receive", seconds] => {
            stream::receive(address, Duration::from_secs(seconds.parse()?))?;
        }
        ["deaf"] => misbehave::deaf()?,
        ["misbehave", seconds] => misbehave::misbehave(Duration::from_secs(seconds.parse()?))?,
        ["legacy", bdf] => virtio::compare(bdf)?,
        ["legacy-copy", bdf, from, to, count] => {
            virtio::copy(bdf, from.parse()?, to.parse()?, count.parse()?)?;
        }
        ["break-rules", bdf, seconds] => {
            virtio::break_rules(bdf, Duration::from_secs(seconds.parse()?))?;
        }
        ["toolstack", run_dir, command @ ..] => device::toolstack(run_dir, command)?,
        ["look", run_dir, domain, space, address, width] => {
            device::look(run_dir, domain.parse()?, space, address, width.parse()?)?;
        }
        ["give", run_dir, domain, mib] => device::give(run_dir, domain.parse()?, mib.parse()?)?,
        ["drive", driver, place, steps @ ..] => device::drive(driver, place, steps)?,
        _ => return Ok(false),
    }
    Ok(true)
}
