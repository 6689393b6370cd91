//! Errors that devices report by PCI Express Advanced Error Reporting (AER), and their registers.
//!
//! A hidden device has no driver that the kernel could tell. What the kernel does by itself: it prints the error, and for a fatal one it
//! resets the link, which resets every device below it. It restores nothing and leaves the device's status registers as they are.
//!
//! | module | holds |
//! |---|---|
//! | this one | what a report is, and where reports come from ([`ErrorReports`]) |
//! | `tracepoint` | the kernel's `ras:aer_event` |
//! | `counters` | the kernel's counters in sysfs, where there is no tracepoint |
//! | [`kernel_log`] | the kernel's log, which tells of DMA that an IOMMU has stopped |
//! | [`registers`] | the status registers of a device |

pub mod counters;
pub mod kernel_log;
pub mod registers;
pub mod tracepoint;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use conf_space::address::Bdf;

/// How bad an uncorrectable error is (PCIe 6.2.2.2). Correctable ones have done no harm; they are counted by the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Severity {
    /// A transaction failed, and the link works.
    NonFatal = 1,
    /// The link cannot be relied on: the kernel resets it.
    Fatal = 2,
}

impl Severity {
    /// How many there are.
    pub const COUNT: usize = 2;

    /// The number in order, from 0.
    pub const fn index(self) -> usize {
        match self {
            Self::NonFatal => 0,
            Self::Fatal => 1,
        }
    }

    /// The severity of that number.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::NonFatal, Self::Fatal]
            .into_iter()
            .find(|severity| *severity as u32 == number)
    }

    /// In an operator's words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NonFatal => "non-fatal",
            Self::Fatal => "fatal",
        }
    }
}

/// An uncorrectable error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorReport {
    /// Who has reported it: a device, or a port above it.
    pub source: Bdf,
    /// How bad it is.
    pub severity: Severity,
}

impl ErrorReport {
    /// Whether it is the concern of a device, the ports above which are `ports`, from the root on.
    ///
    /// As Linux sees it: an error of a port is one of all devices below; and a fatal one of a device has the link of the port above it
    /// reset, and so every device below that port. A device of the root complex has none above.
    pub fn concerns(&self, device: Bdf, ports: &[Bdf], ports_of_source: &[Bdf]) -> bool {
        let shares_link = || {
            ports_of_source
                .last()
                .is_some_and(|port| ports.contains(port))
        };
        self.source == device
            || ports.contains(&self.source)
            || (self.severity == Severity::Fatal && shares_link())
    }
}

/// Where reports come from.
pub trait ErrorReports: Send + fmt::Debug {
    /// Readable when there may be reports.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Takes the reports that have come, without waiting. `assigned` are the devices that guests have, with the ports above each from the
    /// root on.
    ///
    /// # Errors
    /// The kernel's; there will be no more reports then.
    fn take(&mut self, assigned: &[(Bdf, Vec<Bdf>)]) -> io::Result<Vec<ErrorReport>>;

    /// Takes the hidden devices whose DMA an IOMMU has stopped, one for each time. They were told of in the log.
    fn take_stopped(&mut self) -> Vec<Bdf> {
        Vec::new()
    }

    /// How long after an error its report may come.
    fn delay(&self) -> Duration {
        Duration::ZERO
    }

    /// The daemon stops. `keep`: guests have devices, and the next daemon wants to know what happened meanwhile.
    fn close(self: Box<Self>, keep: bool);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bdf(text: &str) -> Bdf {
        text.parse().unwrap()
    }

    #[test]
    fn an_error_is_the_concern_of_those_whom_the_kernel_resets_or_tells() {
        let (root, switch, down) = (bdf("00:01.0"), bdf("01:00.0"), bdf("02:01.0"));
        let (first, second, other) = (bdf("03:00.0"), bdf("03:00.1"), bdf("04:00.0"));
        let above = |device: Bdf| -> Vec<Bdf> {
            match device {
                device if device == root => vec![],
                device if device == switch => vec![root],
                device if device == down => vec![root, switch],
                device if device == other => vec![root, switch, bdf("02:02.0")],
                _ => vec![root, switch, down],
            }
        };
        let concerned = |source, severity| -> Vec<Bdf> {
            let report = ErrorReport { source, severity };
            [first, second, other]
                .into_iter()
                .filter(|device| report.concerns(*device, &above(*device), &above(source)))
                .collect()
        };
        assert_eq!(concerned(first, Severity::NonFatal), [first]);
        assert_eq!(concerned(first, Severity::Fatal), [first, second]);
        assert_eq!(concerned(down, Severity::NonFatal), [first, second]);
        assert_eq!(concerned(switch, Severity::Fatal), [first, second, other]);
        assert_eq!(concerned(root, Severity::Fatal), [first, second, other]);
    }

    #[test]
    fn a_device_of_the_root_complex_is_alone_with_its_errors() {
        let report = ErrorReport {
            source: bdf("00:05.0"),
            severity: Severity::Fatal,
        };
        assert!(report.concerns(bdf("00:05.0"), &[], &[]));
        assert!(!report.concerns(bdf("00:06.0"), &[], &[]));
    }
}
