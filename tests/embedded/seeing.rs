//! What the daemon shows of its guests' operations.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pcibackd::config::Config;
use pcibackd::control::client::Answers;
use pcibackd::control::protocol::{Errors, GuestLine, Request, Response};
use pcibackd::control::traced::{Filter, Traced};
use pcibackd::host::sim::{MSI_ONLY, NVME};
use pcibackd::metrics::Loopback;
use xenbus::DomId;
use xenbus::pciif::{Command, PciOp};
use xenbus::sim::{Frontend, MachineOptions};

use crate::house::{House, at, until};

/// An operation is counted after its guest was told, so it may show a moment later.
fn counted(house: &House, domain: DomId, operations: u64) -> GuestLine {
    until(format!("{operations} operations are counted"), || {
        house.guest_line(domain).unwrap().operations >= operations
    });
    let line = house.guest_line(domain).unwrap();
    assert_eq!(line.operations, operations);
    line
}

/// The guest's operations until now, all counted: the last of them is one that nobody else makes.
fn so_far(house: &House, domain: DomId, frontend: &mut Frontend) -> GuestLine {
    let marker = PciOp {
        cmd: 98,
        ..PciOp::default()
    };
    frontend.operate(&marker).unwrap();
    until("the marker is counted", || {
        let line = house.guest_line(domain).unwrap();
        line.kinds.get("unknown") == Some(&1)
    });
    house.guest_line(domain).unwrap()
}

#[test]
fn operations_are_counted_by_kind_and_by_how_they_ended() {
    let house = House::new(&[NVME, MSI_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME, MSI_ONLY]);
    let before = so_far(&house, domain, &mut frontend);
    let mut operate = |cmd: u32, devfn: u32, offset, size, value| {
        let op = PciOp {
            cmd,
            devfn,
            offset,
            size,
            value,
            ..PciOp::default()
        };
        frontend.operate(&op).unwrap()
    };
    let (read, write) = (Command::ConfRead as u32, Command::ConfWrite as u32);
    for _ in 0..5 {
        operate(read, 0, 4, 4, 0);
    }
    operate(write, 0, 4, 2, 0x0006);
    operate(write, 0, 0x0e, 1, 0xff); // header type: no rule covers it
    operate(read, 0xf8, 0, 4, 0); // nothing there
    operate(read, 0, 3, 4, 0); // not aligned
    operate(99, 0, 0, 0, 0); // no command
    operate(Command::EnableMsix as u32, 8, 0, 0, 1); // it has MSI only
    let after = counted(&house, domain, before.operations + 11);
    let kind = |line: &GuestLine, name: &str| line.kinds.get(name).copied().unwrap_or(0);
    let more = |name| kind(&after, name) - kind(&before, name);
    assert_eq!(
        ["conf_read", "conf_write", "unknown", "enable_msix"].map(more),
        [7, 2, 1, 1]
    );
    let Errors {
        dropped,
        absent,
        refused,
        failed,
    } = after.errors;
    let was = before.errors;
    assert_eq!(
        [
            dropped - was.dropped,
            absent - was.absent,
            refused - was.refused,
            failed - was.failed
        ],
        [1, 1, 3, 0]
    );
}

#[test]
fn the_time_that_operations_take_is_shown() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let before = so_far(&house, domain, &mut frontend);
    assert!(before.latency.p50_ns > 0 && before.latency.p50_ns <= before.latency.max_ns);
    house.bus.set_access_time(NVME, Duration::from_millis(40));
    frontend.conf_read(at(0, 0), 4, 4).unwrap();
    let after = counted(&house, domain, before.operations + 1);
    assert!(after.latency.max_ns >= 40_000_000, "{:?}", after.latency);
    let slow = |line: &GuestLine| {
        let buckets = line.latency.buckets.iter();
        let slow = buckets.filter(|bucket| bucket.up_to_ns.is_none_or(|bound| bound > 40_000_000));
        slow.map(|bucket| bucket.operations).sum::<u64>()
    };
    assert_eq!(slow(&after), slow(&before) + 1);
}

/// Asks for a trace, and returns when it is on.
fn traced(house: &House, filter: Filter) -> Answers {
    let mut answers = house.ask_for_many(&Request::Trace(filter));
    let first = answers.next().unwrap().unwrap();
    assert!(matches!(first, Response::Tracing { .. }), "{first:?}");
    answers
}

fn next(answers: &mut Answers) -> Traced {
    match answers.next().unwrap().unwrap() {
        Response::Operation(traced) => *traced,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_trace_tells_what_a_guest_does_register_by_register() {
    let house = House::new(&[NVME, MSI_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME, MSI_ONLY]);
    // The last of what it did to find its devices has been counted, and is not traced.
    so_far(&house, domain, &mut frontend);
    let mut answers = traced(&house, Filter::default());
    frontend.conf_write(at(0, 0), 4, 2, 0x0006).unwrap();
    frontend.conf_read(at(1, 0), 0, 4).unwrap();
    let write = next(&mut answers);
    assert_eq!((write.domain, write.guest.as_str()), (domain.0, "guest"));
    assert_eq!(
        (write.device, write.seen_as.as_str()),
        (Some(NVME), "0000:00:00.0")
    );
    assert_eq!(
        (write.command.as_str(), write.outcome.as_str()),
        ("conf_write", "done")
    );
    assert_eq!(
        (write.offset, write.size, write.value),
        (Some(4), Some(2), Some(6))
    );
    let fields = write.registers[0]
        .fields
        .iter()
        .map(|field| field.name.as_str());
    assert_eq!(
        (write.registers[0].name.as_str(), fields.collect::<Vec<_>>()),
        ("Command", vec!["Memory Space Enable", "Bus Master Enable"])
    );
    assert!(write.took_ns > 0);
    let read = next(&mut answers);
    assert_eq!(
        (read.device, read.value),
        (Some(MSI_ONLY), Some(0x9235_1b4b))
    );
    assert_eq!(read.registers.len(), 2);
    assert!(read.time_us >= write.time_us);
}

#[test]
fn a_trace_shows_what_is_wanted_and_nothing_else() {
    let house = House::new(&[NVME, MSI_ONLY]);
    let (first, mut nvme) = house.boot(&[NVME]);
    let second = house.named_guest("second", &[MSI_ONLY]);
    let mut msi = house.connected(second);
    let mut done = [
        so_far(&house, first, &mut nvme).operations,
        so_far(&house, second, &mut msi).operations,
    ];
    let mut work = || {
        nvme.conf_read(at(0, 0), 0, 4).unwrap();
        nvme.conf_write(at(0, 0), 4, 2, 6).unwrap();
        nvme.conf_write(at(0, 0), 0x0e, 1, 6).unwrap();
        msi.conf_read(at(0, 0), 0, 4).unwrap();
        msi.conf_write(at(0, 0), 4, 2, 6).unwrap();
    };
    let all = Filter::default();
    let cases = [
        (
            Filter {
                guest: Some(first.to_string()),
                ..all.clone()
            },
            3,
        ),
        (
            Filter {
                guest: Some("second".into()),
                ..all.clone()
            },
            2,
        ),
        (
            Filter {
                device: Some(NVME),
                ..all.clone()
            },
            3,
        ),
        (
            Filter {
                writes: true,
                ..all.clone()
            },
            3,
        ),
        (
            Filter {
                errors: true,
                ..all.clone()
            },
            1,
        ),
        (
            Filter {
                commands: vec!["conf_read".into()],
                ..all.clone()
            },
            2,
        ),
        (
            Filter {
                device: Some(MSI_ONLY),
                writes: true,
                ..all.clone()
            },
            1,
        ),
        (all, 5),
    ];
    for (filter, expected) in cases {
        let mut answers = traced(&house, filter.clone());
        work();
        // None is left over for the next trace.
        done = [done[0] + 3, done[1] + 2];
        counted(&house, first, done[0]);
        counted(&house, second, done[1]);
        for _ in 0..expected {
            next(&mut answers);
        }
        // Hanging up ends it; what was still under way comes first.
        answers
            .connection()
            .unwrap()
            .shutdown(Shutdown::Write)
            .unwrap();
        assert_eq!(answers.count(), 0, "{filter:?}");
    }
}

#[test]
fn a_guest_that_comes_while_it_is_traced_is_traced_from_its_first_operation() {
    let house = House::new(&[NVME]);
    let mut answers = traced(
        &house,
        Filter {
            guest: Some("late".into()),
            ..Filter::default()
        },
    );
    let domain = house.named_guest("late", &[NVME]);
    until("its session is listened to", || {
        house.guest_line(domain).is_some()
    });
    std::thread::sleep(Duration::from_millis(250));
    let frontend = house.connected(domain);
    let function = frontend.function(at(0, 0)).unwrap();
    let first = next(&mut answers);
    assert_eq!(
        (first.domain, first.command.as_str()),
        (domain.0, "conf_read")
    );
    assert_eq!(
        first.value,
        Some(u32::from(function.device) << 16 | u32::from(function.vendor))
    );
}

#[test]
fn a_reader_that_stops_reading_misses_operations_is_told_and_holds_nobody_up() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let before = house.guest_line(domain).unwrap().operations;
    let answers = traced(&house, Filter::default());
    const MANY: u64 = 10_000;
    for _ in 0..MANY {
        frontend.conf_read(at(0, 0), 4, 4).unwrap();
    }
    assert!(house.guest_line(domain).unwrap().operations >= before + MANY - 1);
    let connection = answers.connection().unwrap();
    let (mut told, mut lost) = (0, 0);
    for answer in answers {
        match answer.unwrap() {
            Response::Operation(_) => told += 1,
            Response::Lost { operations, .. } => lost += operations,
            other => panic!("{other:?}"),
        }
        if told + lost >= MANY {
            connection.shutdown(Shutdown::Both).unwrap();
            break;
        }
    }
    assert!(lost > 0 && told > 0, "{told} told, {lost} lost");
}

#[test]
fn a_trace_whose_reader_has_gone_is_off_and_one_does_not_survive_its_daemon() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    assert!(!house.guest_line(domain).unwrap().traced);
    let answers = traced(&house, Filter::default());
    assert!(house.guest_line(domain).unwrap().traced);
    drop(answers);
    until("the trace is off", || {
        !house.guest_line(domain).unwrap().traced
    });
    frontend.conf_read(at(0, 0), 0, 4).unwrap();
    let answers = traced(&house, Filter::default());
    // Which waits until all of its threads have ended, the trace's too.
    house.restart();
    assert_eq!(answers.count(), 0);
    frontend.conf_read(at(0, 0), 0, 4).unwrap();
    assert!(!house.guest_line(domain).unwrap().traced);
}

/// What a scraper gets.
fn scrape(mut stream: impl Read + Write) -> String {
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (header, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(header.starts_with("HTTP/1.0 200 OK"), "{header}");
    body.to_owned()
}

/// The value of a metric for a guest.
fn metric(page: &str, name: &str, labels: &[&str]) -> u64 {
    let is = |line: &&str| {
        line.starts_with(&format!("{name}{{")) && labels.iter().all(|label| line.contains(label))
    };
    let found: Vec<&str> = page.lines().filter(is).collect();
    assert_eq!(found.len(), 1, "{name} {labels:?} in\n{page}");
    found[0].rsplit_once(' ').unwrap().1.parse().unwrap()
}

#[test]
fn metrics_tell_what_the_status_tells() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let config = Config {
        metrics: Some(Loopback::try_from(free.to_string()).unwrap()),
        ..Config::default()
    };
    let house = House::with(config, MachineOptions::default(), &[NVME, MSI_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.conf_write(at(0, 0), 0x0e, 1, 1).unwrap();
    let line = so_far(&house, domain, &mut frontend);
    until("the daemon knows that they are connected", || {
        let line = house.guest_line(domain).unwrap();
        [line.backend, line.frontend]
            .iter()
            .all(|state| state.starts_with("Connected"))
    });
    let socket = house.run_dir().join("metrics.sock");
    let page = scrape(UnixStream::connect(socket).unwrap());
    let guest = format!("domain=\"{domain}\"");
    let value = |name: &str, label: &str| metric(&page, name, &[&guest, "name=\"guest\"", label]);
    let reads = value("pciback_operations_total", "command=\"conf_read\"");
    assert_eq!(reads, line.kinds["conf_read"]);
    assert_eq!(
        value("pciback_dropped_writes_total", ""),
        line.errors.dropped
    );
    let absent = value("pciback_operation_errors_total", "outcome=\"absent\"");
    assert_eq!(absent, line.errors.absent);
    let all = value("pciback_operation_duration_seconds_bucket", "le=\"+Inf\"");
    assert_eq!(all, line.operations);
    assert_eq!(value("pciback_guest_connected", ""), 1);
    assert_eq!(metric(&page, "pciback_devices", &["state=\"assigned\""]), 1);
    assert_eq!(metric(&page, "pciback_devices", &["state=\"hidden\""]), 1);
    let resets = metric(&page, "pciback_device_resets_total", &[&NVME.to_string()]);
    assert_eq!(resets, 1);
    // And so does the port.
    let same = scrape(TcpStream::connect(free).unwrap());
    assert_eq!(
        metric(&same, "pciback_operation_duration_seconds_count", &[&guest]),
        all
    );
}

#[test]
fn the_port_of_the_metrics_is_the_one_that_the_configuration_names_now() {
    // Both are held at once, so that they are two, and are free again then.
    let free = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let [first, second] = free.map(|listener| listener.local_addr().unwrap().to_string());
    let file = tempfile::NamedTempFile::new().unwrap();
    let write = |text: &str| std::fs::write(file.path(), text).unwrap();
    write(&format!("metrics = \"{first}\"\n"));
    let config = Config::load(Some(file.path())).unwrap();
    let house = House::with(config, MachineOptions::default(), &[NVME]);
    // One that is just being closed may take a connection and hang up.
    fn has_metrics(mut stream: impl Read + Write) -> bool {
        let mut answer = String::new();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").is_ok()
            && stream.read_to_string(&mut answer).is_ok()
            && answer.contains("pciback_build_info")
    }
    let serves = |port: &str| TcpStream::connect(port).is_ok_and(has_metrics);
    assert!(serves(&first));

    write(&format!("metrics = \"{second}\"\n"));
    house.reload();
    until("the other port serves", || serves(&second));
    assert!(!serves(&first));
    write("");
    house.reload();
    until("no port serves", || !serves(&second));
    let socket = house.run_dir().join("metrics.sock");
    until("the socket does", || {
        UnixStream::connect(&socket).is_ok_and(has_metrics)
    });
}

#[test]
fn resets_are_counted_from_hiding_on_and_survive_the_daemon() {
    let house = House::new(&[NVME]);
    let resets = || {
        let Response::Devices { devices } = house.ask(&Request::List) else {
            panic!("no list");
        };
        devices
            .iter()
            .find(|line| line.device == NVME)
            .unwrap()
            .resets
    };
    assert_eq!(resets(), 1);
    let (domain, frontend) = house.boot(&[NVME]);
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_free(NVME);
    assert_eq!(resets(), 2);
    house.restart();
    assert_eq!(resets(), 2);
    house.unhide(NVME);
    assert_eq!(resets(), 0);
}

#[test]
fn what_takes_long_can_be_looked_at_meanwhile() {
    let house = House::new(&[]);
    house.bus.set_reset_time(NVME, Duration::from_millis(300));
    let line = || {
        let Response::Devices { devices } = house.ask(&Request::List) else {
            panic!("no list");
        };
        let found = devices
            .into_iter()
            .find(|line| line.device == NVME)
            .unwrap();
        (found.state, found.activity)
    };
    let resetting = Some("resetting".to_owned());
    std::thread::scope(|scope| {
        let hiding = scope.spawn(|| house.hide(&[NVME]));
        until("it is being hidden", || {
            line() == ("hiding".to_owned(), resetting.clone())
        });
        hiding.join().unwrap();
        assert_eq!(line(), ("hidden".to_owned(), None));
        let returning = scope.spawn(|| house.unhide(NVME));
        until("it is on its way back", || {
            line() == ("returning".to_owned(), resetting.clone())
        });
        returning.join().unwrap();
        assert_eq!(line(), ("dom0".to_owned(), None));
    });
}
