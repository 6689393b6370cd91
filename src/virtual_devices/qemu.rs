//! What the guest's own device model has on the guest's first bus. It does not know of our functions, nor Xen of the conflict: where both have
//! a function in one slot, QEMU's is seen.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use xenbus::DomId;

/// The toolstack asks there, too, now and then; who comes second waits.
const PATIENCE: Duration = Duration::from_secs(10);
/// An answer is one line.
const LONGEST_ANSWER: u64 = 1 << 20;

/// A function of QEMU's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Function {
    pub slot: u8,
    /// Such as `VGA controller`.
    pub what: String,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    r#return: Option<Vec<Bus>>,
}

#[derive(Deserialize)]
struct Bus {
    bus: u32,
    devices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    slot: u8,
    class_info: Class,
}

#[derive(Deserialize)]
struct Class {
    #[serde(default)]
    desc: Option<String>,
    class: u32,
}

/// Where libxl has QEMU listen for its own commands.
pub(super) fn socket(domain: DomId) -> PathBuf {
    format!("/var/run/xen/qmp-libxl-{domain}").into()
}

/// What QEMU has on the first bus. Nothing, where it does not listen: it has ended, or is in a domain of its own.
///
/// # Errors
/// It gives no answer.
pub(super) fn functions(socket: &Path) -> io::Result<Vec<Function>> {
    let mut stream = match UnixStream::connect(socket) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(stream.try_clone()?.take(LONGEST_ANSWER));
    // It begins with a greeting, and takes one command before all others (QEMU, docs/interop/qmp-spec).
    let mut line = String::new();
    lines.read_line(&mut line)?;
    for command in ["qmp_capabilities", "query-pci"] {
        writeln!(stream, "{{\"execute\":\"{command}\"}}")?;
        // Events may come in between.
        loop {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if line.contains("\"return\"") {
                break;
            }
            if line.contains("\"error\"") {
                return Err(io::Error::other(line));
            }
        }
    }
    let message: Message = serde_json::from_str(&line)?;
    let buses = message.r#return.into_iter().flatten();
    let first = buses.filter(|bus| bus.bus == 0);
    let functions = first.flat_map(|bus| bus.devices).map(|device| Function {
        slot: device.slot,
        what: device
            .class_info
            .desc
            .unwrap_or_else(|| format!("device of class {:#06x}", device.class_info.class)),
    });
    Ok(functions.collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    #[test]
    fn what_qemu_has_on_the_first_bus_is_asked_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        assert_eq!(functions(&path).unwrap(), []);
        let listener = UnixListener::bind(&path).unwrap();
        let qemu = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let say = |text: &str| writeln!(&stream, "{text}").unwrap();
            say(r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#);
            assert!(lines.next().unwrap().unwrap().contains("qmp_capabilities"));
            say(r#"{"return": {}}"#);
            assert!(lines.next().unwrap().unwrap().contains("query-pci"));
            say(r#"{"timestamp": {}, "event": "RESUME"}"#);
            say(
                r#"{"return": [{"bus": 0, "devices": [
                {"bus": 0, "slot": 0, "function": 0, "class_info": {"class": 1536, "desc": "Host bridge"}, "regions": []},
                {"bus": 0, "slot": 31, "function": 0, "class_info": {"class": 65408}, "qdev_id": ""}]}, {"bus": 1, "devices": []}]}"#
                    .replace('\n', "")
                    .as_str(),
            );
        });
        let found = functions(&path).unwrap();
        let function = |slot, what: &str| Function {
            slot,
            what: what.to_owned(),
        };
        assert_eq!(
            found,
            [
                function(0, "Host bridge"),
                function(31, "device of class 0xff80")
            ]
        );
        qemu.join().unwrap();
    }

    #[test]
    fn qemu_that_says_nothing_useful_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let qemu = thread::spawn(move || {
            for answer in ["", "{}\n{\"error\": {}}\n"] {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        for _ in 0..2 {
            assert!(functions(&path).is_err());
        }
        qemu.join().unwrap();
    }
}
