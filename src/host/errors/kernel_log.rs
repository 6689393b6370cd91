//! The kernel's log, `/dev/kmsg`: it is the only place where Linux tells of DMA that an IOMMU has stopped.
//!
//! What is read there, of Linux 4.1 to 6.x (drivers/iommu/intel/dmar.c, drivers/iommu/amd/iommu.c):
//!
//! | | |
//! |---|---|
//! | VT-d | `DMAR: [DMA Write NO_PASID] Request device [03:00.0] fault addr 0x1000 [fault reason 0x05] ...`; without `NO_PASID`, with numbers without or addresses with `0x`, with a PASID before `fault addr` |
//! | AMD | `vfio-pci 0000:03:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000c address=0x1000 flags=0x0020]`; of a device that the kernel does not know, `AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:03:00.0 domain=...` |
//!
//! The kernel limits these messages itself, to ten in five seconds, on VT-d for all devices together: there may have been more.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use conf_space::address::Bdf;

/// Where the kernel's log is.
pub const KERNEL_LOG: &str = "/dev/kmsg";

/// Bytes of the longest record that the kernel gives.
const LONGEST_RECORD: usize = 8192;

/// What a device wanted to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read memory.
    Read,
    /// Write memory.
    Write,
}

/// Who has asked for memory, as the IOMMU knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requester {
    /// The segment is left out on VT-d.
    has_segment: bool,
    /// Its address.
    bdf: Bdf,
}

impl Requester {
    /// Whether it is that device, as far as the kernel tells.
    pub fn is(self, device: Bdf) -> bool {
        self.in_segment_of(device)
            && (self.bdf.bus(), self.bdf.devfn()) == (device.bus(), device.devfn())
    }

    /// Whether it may stand for a device, the ports above which are `ports`. A bridge to conventional PCI asks for the devices behind it in its
    /// own name, or as function 0 of device 0 on the bus behind it, whether there is such a device (`exists`) or not (PCI Express to PCI
    /// Bridge 1.0, 2.3).
    pub fn stands_for(self, device: Bdf, ports: &[Bdf], exists: impl Fn(Bdf) -> bool) -> bool {
        let as_found = Bdf::from_devfn(device.segment(), self.bdf.bus(), self.bdf.devfn());
        let in_bridges_name = ports.iter().any(|port| self.is(*port));
        let in_nobodys = self.bdf.devfn() == 0
            && self.bdf.bus() == device.bus()
            && self.in_segment_of(device)
            && !exists(as_found);
        in_bridges_name || in_nobodys
    }

    fn in_segment_of(self, device: Bdf) -> bool {
        !self.has_segment || self.bdf.segment() == device.segment()
    }

    /// From an address with or without a segment.
    pub fn parse(text: &str) -> Option<Self> {
        let (buses, _) = text.rsplit_once(':')?;
        Some(Self {
            has_segment: buses.contains(':'),
            bdf: text.parse().ok()?,
        })
    }
}

/// DMA that an IOMMU has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoppedDma {
    /// Whose it was.
    pub requester: Requester,
    /// What it was.
    pub access: Access,
    /// Where it went. VT-d gives the beginning of the page.
    pub address: u64,
}

/// The kernel's log from now on.
#[derive(Debug)]
pub struct KernelLog {
    file: File,
}

impl KernelLog {
    /// Opens the log at its end.
    ///
    /// # Errors
    /// The kernel's; EPERM for who has not CAP_SYSLOG, where the kernel's log is not for everybody.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { file })
    }

    /// Readable when the kernel has said something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What the kernel has told of stopped DMA since the last time, without waiting.
    ///
    /// # Errors
    /// The kernel's; there will be no more then.
    pub fn take(&mut self) -> io::Result<Vec<StoppedDma>> {
        let mut found = Vec::new();
        let mut record = [0; LONGEST_RECORD];
        loop {
            match self.file.read(&mut record) {
                Ok(0) => break,
                Ok(length) => found.extend(record.get(..length).and_then(parse)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Records were overwritten before we came; the next read gets the oldest one that is left.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

/// Reads a record: `PRIORITY,NUMBER,TIME,FLAGS;MESSAGE`, and lines about it (Documentation/ABI/testing/dev-kmsg). A message is one line.
fn parse(record: &[u8]) -> Option<StoppedDma> {
    /// A priority is a level in three bits, and a facility. What programs write has never facility 0, the kernel's.
    const FIRST_OF_PROGRAMS: u32 = 8;
    let record = std::str::from_utf8(record).ok()?;
    let (prefix, message) = record.lines().next()?.split_once(';')?;
    let (priority, _) = prefix.split_once(',')?;
    let priority: u32 = priority.parse().ok()?;
    if priority >= FIRST_OF_PROGRAMS {
        return None;
    }
    vt_d(message).or_else(|| amd(message))
}

fn vt_d(message: &str) -> Option<StoppedDma> {
    let message = message.strip_prefix("DMAR:")?.trim_start();
    let (access, rest) = message
        .strip_prefix("[DMA ")?
        .split_once("] Request device [")?;
    let access = match access.split(' ').next()? {
        "Read" => Access::Read,
        "Write" => Access::Write,
        _ => return None,
    };
    let (requester, rest) = rest.split_once(']')?;
    let (_, rest) = rest.split_once(" fault addr ")?;
    Some(StoppedDma {
        // Linux 5.15 writes [0x03:0x00.0].
        requester: Requester::parse(&requester.replace("0x", ""))?,
        access,
        address: hexadecimal(rest.split(' ').next()?)?,
    })
}

fn amd(message: &str) -> Option<StoppedDma> {
    /// In the event's flags: it was an interrupt; it was to be written.
    const INTERRUPT: u64 = 1 << 3;
    const WRITE: u64 = 1 << 5;
    let (before, event) = message.split_once("Event logged [IO_PAGE_FAULT ")?;
    let (fields, _) = event.split_once(']')?;
    let field = |name: &str| fields.split(' ').find_map(|field| field.strip_prefix(name));
    let requester = match field("device=") {
        Some(device) if before == "AMD-Vi: " => device,
        Some(_) => return None,
        // The kernel's form for all that it says of a device: DRIVER ADDRESS: MESSAGE.
        None => before.split(' ').nth(1)?.strip_suffix(':')?,
    };
    let flags = hexadecimal(field("flags=")?)?;
    if flags & INTERRUPT != 0 {
        return None;
    }
    Some(StoppedDma {
        requester: Requester::parse(requester)?,
        access: if flags & WRITE == 0 {
            Access::Read
        } else {
            Access::Write
        },
        address: hexadecimal(field("address=")?)?,
    })
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use proptest::prelude::*;

    use super::*;

    fn bdf(text: &str) -> Bdf {
        text.parse().unwrap()
    }

    fn stopped(requester: &str, access: Access, address: u64) -> StoppedDma {
        StoppedDma {
            requester: Requester::parse(requester).unwrap(),
            access,
            address,
        }
    }

    const VT_D: &str = "3,871,5140900,-;DMAR: [DMA Write NO_PASID] Request device [00:05.0] fault addr 0x40010000 [fault reason 0x05] PTE Write access is not set\n";

    #[test]
    fn what_vt_d_stops_is_understood_as_kernels_from_4_to_6_tell_it() {
        let rest = "[fault reason 06] PTE Read access is not set\n";
        for (message, expected) in [
            (
                VT_D.to_owned(),
                stopped("00:05.0", Access::Write, 0x4001_0000),
            ),
            (
                format!(
                    "3,1,2,-;DMAR: [DMA Read] Request device [03:1f.7] fault addr ffff8000 {rest}"
                ),
                stopped("03:1f.7", Access::Read, 0xffff_8000),
            ),
            (
                format!(
                    "3,1,2,-;DMAR: [DMA Read] Request device [03:00.0] PASID ffffffff fault addr 1000 {rest}"
                ),
                stopped("03:00.0", Access::Read, 0x1000),
            ),
            (
                format!(
                    "3,1,2,-;DMAR: [DMA Write PASID 0x1] Request device [0x00:0x02.0] fault addr 0x3a818000 {rest} SUBSYSTEM=pci\n"
                ),
                stopped("00:02.0", Access::Write, 0x3a81_8000),
            ),
        ] {
            assert_eq!(parse(message.as_bytes()), Some(expected), "{message}");
        }
    }

    #[test]
    fn what_amds_iommu_stops_is_understood() {
        let event = "domain=0x000c address=0xfd0d0000 flags=0x0020]\n SUBSYSTEM=pci\n DEVICE=+pci:0000:03:00.0\n";
        for before in [
            "vfio-pci 0001:03:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT ",
            "vfio-pci 0001:03:00.0: Event logged [IO_PAGE_FAULT ",
            "AMD-Vi: Event logged [IO_PAGE_FAULT device=0001:03:00.0 ",
        ] {
            assert_eq!(
                parse(format!("3,1,2,-;{before}{event}").as_bytes()),
                Some(stopped("0001:03:00.0", Access::Write, 0xfd0d_0000)),
                "{before}"
            );
        }
        let read = "3,1,2,-;AMD-Vi: Event logged [IO_PAGE_FAULT device=03:00.0 domain=0x0000 address=0x10 flags=0x0000]\n";
        let expected = stopped("03:00.0", Access::Read, 0x10);
        assert_eq!(parse(read.as_bytes()), Some(expected));
        let interrupt = read.replace("flags=0x0000", "flags=0x0008");
        assert_eq!(parse(interrupt.as_bytes()), None);
    }

    #[test]
    fn nothing_else_is_taken_for_stopped_dma() {
        for record in [
            "3,871,5140901,-;DMAR: DRHD: handling fault status reg 2\n",
            "3,1,2,-;DMAR: [INTR-REMAP] Request device [03:00.0] fault index 0x10 [fault reason 0x22]\n",
            "3,1,2,-;DMAR: [DMA Elsewhere] Request device [03:00.0] fault addr 0x10 [fault reason 0x05]\n",
            "3,1,2,-;DMAR: [DMA Read] Request device [03:00.0] fault addr 0x10000000000000000 [fault reason 0x05]\n",
            "3,1,2,-;DMAR: [DMA Read] Request device [03:20.0] fault addr 0x10 [fault reason 0x05]\n",
            "3,1,2,-;a device says DMAR: [DMA Read] Request device [03:00.0] fault addr 0x10\n",
            "3,1,2,-;x AMD-Vi: Event logged [IO_PAGE_FAULT device=03:00.0 domain=0x0 address=0x10 flags=0x0]\n",
            ";",
            "",
        ] {
            assert_eq!(parse(record.as_bytes()), None, "{record}");
        }
        // As a program that writes to /dev/kmsg.
        let forged = VT_D.replacen("3,", "11,", 1);
        assert_eq!(parse(forged.as_bytes()), None);
    }

    #[test]
    fn a_requester_is_a_device_of_any_segment_unless_the_kernel_names_it() {
        let by_vt_d = Requester::parse("03:00.1").unwrap();
        assert!(by_vt_d.is(bdf("0000:03:00.1")) && by_vt_d.is(bdf("0001:03:00.1")));
        assert!(!by_vt_d.is(bdf("0000:03:00.0")));
        let by_amd = Requester::parse("0001:03:00.1").unwrap();
        assert!(by_amd.is(bdf("0001:03:00.1")) && !by_amd.is(bdf("0000:03:00.1")));
    }

    #[test]
    fn a_bridge_asks_for_what_is_behind_it() {
        let (root, bridge, device) = (bdf("00:0b.0"), bdf("02:00.0"), bdf("03:01.0"));
        let stands = |requester: &str, exists: bool| {
            let requester = Requester::parse(requester).unwrap();
            requester.stands_for(device, &[root, bridge], |_| exists)
        };
        assert!(stands("02:00.0", true));
        assert!(stands("03:00.0", false));
        // Another device, of the host's.
        assert!(!stands("03:00.0", true));
        assert!(!stands("03:02.0", false));
        assert!(!stands("04:00.0", false));
    }

    #[test]
    fn records_are_taken_one_by_one_until_there_are_no_more() {
        let (kernel, file) = UnixDatagram::pair().unwrap();
        file.set_nonblocking(true).unwrap();
        let mut log = KernelLog {
            file: File::from(OwnedFd::from(file)),
        };
        assert_eq!(log.take().unwrap(), []);
        let mut kernel = File::from(OwnedFd::from(kernel));
        for record in [VT_D, "6,1,2,-;usb 1-1: new device\n", VT_D] {
            kernel.write_all(record.as_bytes()).unwrap();
        }
        let told = stopped("00:05.0", Access::Write, 0x4001_0000);
        assert_eq!(log.take().unwrap(), [told, told]);
        assert_eq!(log.take().unwrap(), []);
    }

    #[test]
    fn what_was_said_before_is_not_read() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(VT_D.as_bytes()).unwrap();
        let mut log = KernelLog::open(file.path()).unwrap();
        assert_eq!(log.take().unwrap(), []);
    }

    proptest! {
        #[test]
        fn no_record_makes_it_panic(record in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&record);
        }

        #[test]
        fn no_message_that_is_almost_one_makes_it_panic(
            cut in 0..VT_D.len(),
            junk in "[\\[\\]0-9a-fx:. ]{0,20}",
            end in 0..VT_D.len(),
        ) {
            let (before, after) = (VT_D.get(..cut).unwrap(), VT_D.get(end..).unwrap());
            let _ = parse(format!("{before}{junk}{after}").as_bytes());
            let _ = parse(format!("3,1,2,-;v {before}: Event logged [IO_PAGE_FAULT address={junk} flags={after}").as_bytes());
        }

        #[test]
        fn every_address_of_every_device_is_read(device in any::<u16>(), address in any::<u64>()) {
            let [bus, devfn] = device.to_be_bytes();
            let bdf = Bdf::from_devfn(0, bus, devfn).to_string();
            let short = bdf.strip_prefix("0000:").unwrap();
            let record = format!("3,1,2,-;DMAR: [DMA Read NO_PASID] Request device [{short}] fault addr {address:#x} [fault reason 0x06] PTE\n");
            prop_assert_eq!(parse(record.as_bytes()), Some(stopped(short, Access::Read, address)));
        }
    }
}
