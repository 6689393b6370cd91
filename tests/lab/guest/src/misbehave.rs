//! What a hostile guest can do to its backend.

use std::error::Error;
use std::time::{Duration, Instant};

use xenbus::xenstore::Store;

use crate::frontend::{ACTIVE, AER_HANDLER, DIRECTORY, FLAGS, Frontend, WORDS};
use crate::random::Random;

/// The words of an operation: command, error, domain, bus, devfn, offset, size, value, info. The MSI-X entries follow.
const COMMAND: usize = 1;
const DOMAIN: usize = 3;
const BUS: usize = 4;
const DEVFN: usize = 5;
const OFFSET: usize = 6;
const SIZE: usize = 7;
const VALUE: usize = 8;
const ENTRIES: usize = 10;

const PATIENCE: Duration = Duration::from_millis(200);

/// Each kind of misbehaviour for `duration`, from a frontend that connected properly.
pub fn misbehave(duration: Duration) -> Result<(), Box<dyn Error>> {
    let mut random = Random::new();
    let mut frontend = Frontend::connect()?;
    println!("connected to {}", frontend.backend);
    report(
        "noise",
        operations(&frontend, duration, || noise(&frontend, &mut random))?,
    );
    report(
        "nonsense",
        operations(&frontend, duration, || nonsense(&frontend, &mut random))?,
    );
    report("changing", changing(&frontend, &mut random, duration)?);
    println!("flood: {} events", flood(&frontend, duration)?);
    // Still served after all that? An honest read of the vendor ID of virtual device 0000:00:00.0.
    for index in COMMAND..WORDS {
        frontend.page.store(index, 0);
    }
    frontend.page.store(SIZE, 4);
    let answered = frontend.operate(Duration::from_secs(2))?;
    println!(
        "honest: answered {answered}, value {:#010x}",
        frontend.page.load(VALUE)
    );
    println!("lies: {} told", lies(&mut frontend, &mut random, duration)?);
    Ok(())
}

/// Says that it handles errors of devices, and answers nothing.
pub fn deaf() -> Result<(), Box<dyn Error>> {
    let frontend = Frontend::connect()?;
    frontend.page.store(FLAGS, AER_HANDLER);
    println!("connected to {}", frontend.backend);
    loop {
        std::thread::park();
    }
}

fn report(what: &str, (sent, answered): (u64, u64)) {
    println!("{what}: {sent} operations, {answered} answered");
}

fn operations(
    frontend: &Frontend,
    duration: Duration,
    mut prepare: impl FnMut(),
) -> Result<(u64, u64), Box<dyn Error>> {
    let (mut sent, mut answered) = (0u64, 0u64);
    let begin = Instant::now();
    while begin.elapsed() < duration {
        prepare();
        sent = sent.saturating_add(1);
        answered = answered.saturating_add(frontend.operate(PATIENCE)?.into());
    }
    Ok((sent, answered))
}

/// Random words all over the page, flags included.
fn noise(frontend: &Frontend, random: &mut Random) {
    for index in FLAGS..WORDS {
        frontend.page.store(index, random.word());
    }
}

/// Operations that look right but for some of their fields.
fn nonsense(frontend: &Frontend, random: &mut Random) {
    let mut set =
        |index: usize, choices: &[u32]| frontend.page.store(index, random.of(choices).unwrap_or(0));
    set(
        COMMAND,
        &[0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11, u32::MAX],
    );
    set(DOMAIN, &[0, 0, 0, 0, 1, u32::MAX]);
    set(BUS, &[0, 0, 0, 0, 1, 256, u32::MAX]);
    set(DEVFN, &[0, 0, 0, 0, 0, 8, 255, 256, u32::MAX]);
    set(
        OFFSET,
        &[
            0,
            4,
            0x10,
            0x3c,
            0xfc,
            0xff,
            0x100,
            0xffc,
            0xfff,
            0x1000,
            0x7fff_ffff,
            0x8000_0000,
            u32::MAX,
            u32::MAX - 3,
        ],
    );
    set(
        SIZE,
        &[0, 1, 2, 3, 4, 4, 5, 8, 0x7fff_ffff, 0x8000_0000, u32::MAX],
    );
    set(VALUE, &[0, 1, 3, 0x407, 128, 129, 0x1000, u32::MAX]);
    for index in ENTRIES..ENTRIES + 8 {
        set(index, &[0, 0x0001_0000, 0x0002_0000, 0xffff_0000, u32::MAX]);
    }
}

/// Changes an operation while the backend is at it: what it checked is not what it finds when it looks again.
fn changing(
    frontend: &Frontend,
    random: &mut Random,
    duration: Duration,
) -> Result<(u64, u64), Box<dyn Error>> {
    let (mut sent, mut answered) = (0u64, 0u64);
    let begin = Instant::now();
    while begin.elapsed() < duration {
        nonsense(frontend, random);
        frontend.page.store(FLAGS, ACTIVE);
        frontend.port.notify()?;
        sent = sent.saturating_add(1);
        for _ in 0..2000 {
            if frontend.page.load(FLAGS) & ACTIVE == 0 {
                answered = answered.saturating_add(1);
                break;
            }
            let index = random
                .of(&[COMMAND, DOMAIN, DEVFN, OFFSET, SIZE, VALUE, ENTRIES])
                .unwrap_or(VALUE);
            frontend.page.store(index, random.word());
        }
    }
    Ok((sent, answered))
}

/// Events with nothing to do, as fast as they go.
fn flood(frontend: &Frontend, duration: Duration) -> Result<u64, Box<dyn Error>> {
    let mut sent = 0u64;
    let begin = Instant::now();
    while begin.elapsed() < duration {
        frontend.port.notify()?;
        sent = sent.saturating_add(1);
    }
    Ok(sent)
}

fn truth(
    frontend: &mut Frontend,
    [reference, port, magic]: &[String; 3],
) -> Result<(), xenbus::xenstore::Error> {
    frontend
        .store
        .write(&format!("{DIRECTORY}/pci-op-ref"), reference)?;
    frontend
        .store
        .write(&format!("{DIRECTORY}/event-channel"), port)?;
    frontend.store.write(&format!("{DIRECTORY}/magic"), magic)
}

/// Wrong values in the frontend's nodes, nodes that come and go, states out of order. What xenstored itself refuses is no lie told.
fn lies(
    frontend: &mut Frontend,
    random: &mut Random,
    duration: Duration,
) -> Result<u64, Box<dyn Error>> {
    let long = "9".repeat(1500);
    // No small number for a grant: those are this guest's own console and xenstore, which it would only spoil for itself.
    let wrong: [&[u8]; 7] = [
        b"",
        b"-1",
        b"1048575",
        b"4294967296",
        b"7 and more",
        b"\xff\xfe\x00\n",
        long.as_bytes(),
    ];
    let states: [&[u8]; 10] = [b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8", b"9"];
    let right = [
        frontend.page.reference.to_string(),
        frontend.port.number.to_string(),
        xenbus::pciif::MAGIC.to_owned(),
    ];
    let nodes = [
        "state",
        "pci-op-ref",
        "event-channel",
        "magic",
        "backend",
        "more/below",
    ];
    let mut told = 0u64;
    let begin = Instant::now();
    while begin.elapsed() < duration {
        let node = random.of(&nodes).unwrap_or("state");
        let path = format!("{DIRECTORY}/{node}");
        let done = match random.word() % 8 {
            0 => frontend.store.rm(&path),
            1 | 2 => frontend
                .store
                .write(&path, random.of(&wrong).unwrap_or(b"")),
            // The truth, now and then: or there would be nothing left to lie about.
            3 | 4 => truth(frontend, &right),
            _ => frontend.store.write(
                &format!("{DIRECTORY}/state"),
                random.of(&states).unwrap_or(b""),
            ),
        };
        told = told.saturating_add(done.is_ok().into());
    }
    // The last one: there never was a frontend.
    frontend.store.rm(DIRECTORY)?;
    Ok(told)
}
