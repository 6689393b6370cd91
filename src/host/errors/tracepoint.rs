//! The kernel's tracepoint `ras:aer_event`, which tells of every error that a device or a port reports, whether a driver is bound or not.
//!
//! It is heard through an instance of our own below `/sys/kernel/tracing/instances`: a ring buffer that nobody else reads or fills. The
//! instance outlives the daemon while guests have devices, so that what happens during a restart is read afterwards.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use conf_space::address::Bdf;
use log::warn;
use nix::mount::{MsFlags, mount};

use super::{ErrorReport, ErrorReports, Severity};

/// Where the tracing file system is by convention.
pub const TRACING: &str = "/sys/kernel/tracing";

/// The kernel's default is more than a megabyte for each CPU. This is room for more than a hundred errors.
const BUFFER_KIB: &str = "16";
/// Correctable errors (2) can come by the thousand, and nothing is done about them.
const FILTER: &str = "severity != 2";
/// A line of text is shorter. What is longer is dropped.
const LONGEST_LINE: usize = 4096;

/// The tracepoint cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}")]
pub struct TracepointError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The tracepoint, opened.
#[derive(Debug)]
pub struct Tracepoint {
    instance: PathBuf,
    pipe: File,
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
}

impl Tracepoint {
    /// Makes the instance below `tracing`, or takes up the one that an earlier daemon left, and listens. The file system is mounted at
    /// [`TRACING`] if it is not yet.
    ///
    /// # Errors
    /// When the kernel has no such tracepoint, or tracing is not to be had.
    pub fn open(tracing: &Path) -> Result<Self, TracepointError> {
        let error = |action, path: &Path| {
            let path = path.to_owned();
            move |source| TracepointError {
                action,
                path,
                source,
            }
        };
        let instances = tracing.join("instances");
        if !instances.exists() && tracing == Path::new(TRACING) {
            let none = None::<&str>;
            mount(
                Some("tracefs"),
                tracing,
                Some("tracefs"),
                MsFlags::empty(),
                none,
            )
            .map_err(io::Error::from)
            .map_err(error("mount tracefs on", tracing))?;
        }
        let instance = instances.join("pcibackd");
        match fs::create_dir(&instance) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error("make", &instance)(source));
            }
            _ => {}
        }
        let event = instance.join("events/ras/aer_event");
        for (path, value) in [
            (instance.join("buffer_size_kb"), BUFFER_KIB),
            // Otherwise the pipe is said to be readable only when the buffer is half full.
            (instance.join("buffer_percent"), "0"),
            (event.join("filter"), FILTER),
            (event.join("enable"), "1"),
            (instance.join("tracing_on"), "1"),
        ] {
            set(&path, value).map_err(error("write", &path))?;
        }
        for option in ["noraw", "nohex", "nobin"] {
            // New instances inherit these from whoever debugs the kernel. Those that a kernel does not know are not set either.
            let _ = set(&instance.join("trace_options"), option);
        }
        let pipe = instance.join("trace_pipe");
        let pipe = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&pipe)
            .map_err(error("open", &pipe))?;
        Ok(Self {
            instance,
            pipe,
            partial: Vec::new(),
        })
    }

    /// Splits what has come into lines.
    fn lines(&mut self, bytes: &[u8], reports: &mut Vec<ErrorReport>) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                reports.extend(parse(&String::from_utf8_lossy(&self.partial)));
                self.partial.clear();
            } else if self.partial.len() > LONGEST_LINE {
                self.partial.clear();
            }
        }
    }
}

impl ErrorReports for Tracepoint {
    fn fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    fn take(&mut self, _assigned: &[(Bdf, Vec<Bdf>)]) -> io::Result<Vec<ErrorReport>> {
        let mut reports = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match self.pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => self.lines(buffer.get(..length).unwrap_or_default(), &mut reports),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(reports)
    }

    fn close(self: Box<Self>, keep: bool) {
        let Self { instance, pipe, .. } = *self;
        // An instance that is being read cannot be removed.
        drop(pipe);
        if !keep && let Err(error) = fs::remove_dir(&instance) {
            warn!("cannot remove {}: {error}", instance.display());
        }
    }
}

fn set(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// Reads a line of the trace: `... aer_event: 0000:01:00.0 PCIe Bus Error: severity=Fatal, ...`, as it has been since Linux 3.10.
fn parse(line: &str) -> Option<ErrorReport> {
    let (_, event) = line.split_once("aer_event: ")?;
    let (source, event) = event.split_once(' ')?;
    let (_, severity) = event.split_once("severity=")?;
    let severity = if severity.starts_with("Fatal,") {
        Severity::Fatal
    } else if severity.starts_with("Uncorrected, non-fatal,") {
        Severity::NonFatal
    } else {
        return None;
    };
    Some(ErrorReport {
        source: source.parse().ok()?,
        severity,
    })
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;

    use super::*;

    const FATAL: &str = " irq/28-aerdrv-71      [001] .....    15.184: aer_event: 0000:01:00.0 PCIe Bus Error: severity=Fatal, Data Link Protocol, TLP Header=Not available\n";
    const NON_FATAL: &str = "   kworker/0:1-23 [000] d..1. 7.2: aer_event: 0001:02:00.1 PCIe Bus Error: severity=Uncorrected, non-fatal, Completer Abort|Unsupported Request, TLP Header={0x1,0x2,0x3,0x4}\n";
    const CORRECTED: &str = " irq/28-aerdrv-71 [001] ..... 15.1: aer_event: 0000:01:00.0 PCIe Bus Error: severity=Corrected, Bad TLP, TLP Header=Not available\n";

    fn report(source: &str, severity: Severity) -> ErrorReport {
        ErrorReport {
            source: source.parse().unwrap(),
            severity,
        }
    }

    #[test]
    fn lines_of_the_trace_are_understood() {
        assert_eq!(parse(FATAL), Some(report("0000:01:00.0", Severity::Fatal)));
        assert_eq!(
            parse(NON_FATAL),
            Some(report("0001:02:00.1", Severity::NonFatal))
        );
        for other in [
            CORRECTED,
            "CPU:0 [LOST 5 EVENTS]\n",
            "aer_event: ",
            "aer_event: x PCIe Bus Error: severity=Fatal, ",
            "",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    /// The instance's files, with a pipe for a pipe.
    fn tracing() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let instance = dir.path().join("instances/pcibackd");
        fs::create_dir_all(instance.join("events/ras/aer_event")).unwrap();
        for file in [
            "buffer_size_kb",
            "buffer_percent",
            "tracing_on",
            "trace_options",
            "events/ras/aer_event/filter",
            "events/ras/aer_event/enable",
        ] {
            fs::write(instance.join(file), "").unwrap();
        }
        nix::unistd::mkfifo(&instance.join("trace_pipe"), Mode::S_IRWXU).unwrap();
        (dir, instance)
    }

    #[test]
    fn reports_come_whole_however_the_pipe_cuts_them() {
        let (dir, instance) = tracing();
        let mut tracepoint = Tracepoint::open(dir.path()).unwrap();
        let mut kernel = OpenOptions::new()
            .write(true)
            .open(instance.join("trace_pipe"))
            .unwrap();
        let text = format!("{FATAL}CPU:1 [LOST 3 EVENTS]\n{NON_FATAL}");
        let (first, second) = text.split_at(60);
        kernel.write_all(first.as_bytes()).unwrap();
        assert_eq!(tracepoint.take(&[]).unwrap(), []);
        kernel.write_all(second.as_bytes()).unwrap();
        assert_eq!(
            tracepoint.take(&[]).unwrap(),
            [
                report("0000:01:00.0", Severity::Fatal),
                report("0001:02:00.1", Severity::NonFatal)
            ]
        );
        assert_eq!(tracepoint.take(&[]).unwrap(), []);
    }

    #[test]
    fn a_line_without_end_does_not_grow() {
        let (dir, instance) = tracing();
        let mut tracepoint = Tracepoint::open(dir.path()).unwrap();
        let mut kernel = OpenOptions::new()
            .write(true)
            .open(instance.join("trace_pipe"))
            .unwrap();
        for _ in 0..20 {
            kernel.write_all(&[b'x'; 4000]).unwrap();
            assert_eq!(tracepoint.take(&[]).unwrap(), []);
        }
        assert!(tracepoint.partial.len() <= LONGEST_LINE + 4096);
    }

    #[test]
    fn only_uncorrectable_errors_are_asked_for_and_the_buffer_is_small() {
        let (dir, instance) = tracing();
        Tracepoint::open(dir.path()).unwrap();
        let read = |file| fs::read_to_string(instance.join(file)).unwrap();
        assert_eq!(read("events/ras/aer_event/filter"), "severity != 2");
        assert_eq!(read("events/ras/aer_event/enable"), "1");
        assert_eq!(read("buffer_percent"), "0");
        assert_eq!(read("buffer_size_kb"), "16");
    }

    #[test]
    fn a_kernel_without_the_tracepoint_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("instances")).unwrap();
        let error = Tracepoint::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("buffer_size_kb"), "{error}");
        assert!(Tracepoint::open(&dir.path().join("none")).is_err());
    }
}
