//! A guest's edu and NVMe disk at work on the same memory. The edu goes meanwhile, and comes again.

use std::rc::Rc;

use super::edu::{self, Edu};
use super::embedded::Guest;
use super::nvme::{self, Nvme};
use super::{PAGE, Result, Signal, switched_on};

/// Pages of the memory that neither driver uses for itself.
const FIRST: u64 = 0x1_0000;
const SECOND: u64 = 0x1_1000;
const THIRD: u64 = 0x1_2000;
const LAST: u64 = 0x1_3000;

pub fn drive(guest: &Rc<Guest>, steps: &[&str]) -> Result<()> {
    let mut disk = Nvme::start(switched_on(guest.find(nvme::IDS)?)?)?;
    let mut edu = Some(open_edu(guest)?);
    for (number, step) in (1u32..).zip(steps) {
        match (*step, &mut edu) {
            ("work", Some(edu)) => {
                work(&mut disk, edu, number)?;
                println!("both work");
            }
            ("lose", Some(_)) => {
                edu = None;
                guest.await_device(edu::IDS, false)?;
                disk.write()?;
                println!("the disk works alone");
            }
            ("find", None) => {
                guest.await_device(edu::IDS, true)?;
                edu = Some(open_edu(guest)?);
                disk.write()?;
            }
            _ => return Err(format!("both cannot '{step}' now").into()),
        }
    }
    disk.stop()
}

fn open_edu(guest: &Rc<Guest>) -> Result<Edu> {
    Edu::new(switched_on(guest.find(edu::IDS)?)?)
}

/// Has each of them take over what the other one has put into the memory, and has both interrupt. `seed` is another each time.
fn work(disk: &mut Nvme, edu: &mut Edu, seed: u32) -> Result<()> {
    let pattern: Vec<u8> = (1..=251)
        .cycle()
        .skip(seed as usize)
        .take(edu::BUFFER_SIZE as usize)
        .collect();
    let memory = disk.memory();
    memory.fill(FIRST, pattern.iter().copied());
    for page in [SECOND, THIRD, LAST] {
        memory.fill(page, [0; PAGE as usize]);
    }
    edu.carry(FIRST, SECOND)?;
    disk.through(SECOND, THIRD)?;
    edu.carry(THIRD, LAST)?;
    if disk.memory().bytes(LAST, edu::BUFFER_SIZE) != pattern {
        return Err("what went through both devices came out as something else".into());
    }
    edu.interrupts(Signal::Msi)?;
    disk.write()
}
