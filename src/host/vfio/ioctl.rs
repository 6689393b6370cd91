//! VFIO's system calls (`linux/vfio.h`), as far as vfio-ioctls has them not or hides their errors.
//!
//! Most of them take a structure that begins with its own size in bytes (`argsz`); the kernel reads and writes no more than that. So a
//! slice of words is all that is needed, and whoever fills it in names the words.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};

use conf_space::address::Bdf;
use nix::errno::Errno;
use nix::request_code_none;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_TYPE,
};

/// A call whose argument begins with its size. What it does depends on what it is asked of.
#[derive(Debug, Clone, Copy)]
struct Sized(u32);

const GROUP_GET_STATUS: Sized = Sized(3);
const DEVICE_GET_INFO: Sized = Sized(7);
const DEVICE_GET_REGION_INFO: Sized = Sized(8);
const DEVICE_GET_IRQ_INFO: Sized = Sized(9);
const DEVICE_SET_IRQS: Sized = Sized(10);
const DEVICE_GET_PCI_HOT_RESET_INFO: Sized = Sized(12);
const DEVICE_PCI_HOT_RESET: Sized = Sized(13);
const IOMMU_GET_INFO: Sized = Sized(12);

/// Numbers of the others.
const SET_IOMMU: u32 = 2;
const GROUP_SET_CONTAINER: u32 = 4;
const GROUP_GET_DEVICE_FD: u32 = 6;
const DEVICE_RESET: u32 = 11;

const fn request(number: u32) -> libc::c_ulong {
    request_code_none!(VFIO_TYPE, VFIO_BASE.wrapping_add(number))
}

/// Bytes of a word.
const WORD: usize = size_of::<u32>();

/// Gives and takes a structure, the size of which is written into its first word. The result is what the call returns, not negative.
fn exchange(file: BorrowedFd<'_>, call: Sized, words: &mut [u32]) -> io::Result<u32> {
    let size = words
        .len()
        .checked_mul(WORD)
        .and_then(|bytes| u32::try_from(bytes).ok());
    let (Some(size), Some(first)) = (size, words.first_mut()) else {
        return Err(Errno::EINVAL.into());
    };
    *first = size;
    // SAFETY: the kernel reads and writes no more than the bytes that the first word says, which are those of `words`.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request(call.0), words.as_mut_ptr()) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn word(words: &[u32], index: usize) -> u32 {
    words.get(index).copied().unwrap_or_default()
}

fn long(words: &[u32], index: usize) -> u64 {
    let high = u64::from(word(words, index.saturating_add(1)));
    high << 32 | u64::from(word(words, index))
}

/// `VFIO_GROUP_GET_STATUS`: the group's flags.
pub(super) fn group_status(group: &File) -> io::Result<u32> {
    let mut status = [0; 2];
    exchange(group.as_fd(), GROUP_GET_STATUS, &mut status)?;
    Ok(word(&status, 1))
}

/// `VFIO_GROUP_SET_CONTAINER`.
pub(super) fn set_container(group: &File, container: BorrowedFd<'_>) -> io::Result<()> {
    let container = container.as_raw_fd();
    // SAFETY: the kernel reads one descriptor's number.
    let result = unsafe {
        libc::ioctl(
            group.as_raw_fd(),
            request(GROUP_SET_CONTAINER),
            std::ptr::from_ref(&container),
        )
    };
    Ok(Errno::result(result).map(drop)?)
}

/// `VFIO_SET_IOMMU`.
pub(super) fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    let result = unsafe {
        libc::ioctl(
            container.as_raw_fd(),
            request(SET_IOMMU),
            libc::c_ulong::from(kind),
        )
    };
    Ok(Errno::result(result).map(drop)?)
}

/// `VFIO_GROUP_GET_DEVICE_FD`. The kernel enables the device, and resets it if it can.
pub(super) fn open_device(group: &File, bdf: Bdf) -> io::Result<File> {
    let name = CString::new(bdf.to_string())?;
    // SAFETY: the kernel reads a string that ends with a zero.
    let result = unsafe {
        libc::ioctl(
            group.as_raw_fd(),
            request(GROUP_GET_DEVICE_FD),
            name.as_ptr(),
        )
    };
    let fd = Errno::result(result)?;
    // SAFETY: a new descriptor, which nobody else knows.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// What `VFIO_DEVICE_GET_INFO` says.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceInfo {
    pub flags: u32,
    pub regions: u32,
    pub interrupts: u32,
}

pub(super) fn device_info(device: &File) -> io::Result<DeviceInfo> {
    let mut info = [0; 4];
    exchange(device.as_fd(), DEVICE_GET_INFO, &mut info)?;
    Ok(DeviceInfo {
        flags: word(&info, 1),
        regions: word(&info, 2),
        interrupts: word(&info, 3),
    })
}

/// What `VFIO_DEVICE_GET_REGION_INFO` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RegionInfo {
    pub flags: u32,
    pub size: u64,
    /// Where in the device's file it begins.
    pub offset: u64,
    /// All that was said, its capabilities too.
    pub words: Vec<u32>,
    /// Offset in bytes of the first capability; 0: none.
    pub capabilities: u32,
}

pub(super) fn region_info(device: &File, index: u32) -> io::Result<RegionInfo> {
    let words = described(
        device.as_fd(),
        DEVICE_GET_REGION_INFO,
        [0, 0, index, 0, 0, 0, 0, 0],
    )?;
    Ok(RegionInfo {
        flags: word(&words, 1),
        capabilities: word(&words, 3),
        size: long(&words, 4),
        offset: long(&words, 6),
        words,
    })
}

/// What `VFIO_IOMMU_GET_INFO` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct IommuInfo {
    /// A bit for each size of pages.
    pub page_sizes: u64,
    /// All that was said, its capabilities too.
    pub words: Vec<u32>,
    /// Offset in bytes of the first capability; 0: none.
    pub capabilities: u32,
}

pub(super) fn iommu_info(container: BorrowedFd<'_>) -> io::Result<IommuInfo> {
    let words = described(container, IOMMU_GET_INFO, [0; 6])?;
    Ok(IommuInfo {
        page_sizes: long(&words, 2),
        capabilities: word(&words, 4),
        words,
    })
}

/// Asks for a description with all of its capabilities: the kernel says how much it has to say.
fn described<const N: usize>(
    file: BorrowedFd<'_>,
    call: Sized,
    question: [u32; N],
) -> io::Result<Vec<u32>> {
    /// Words of any description there is: more is no answer.
    const MOST: usize = 64 * 1024;
    let mut words = question.to_vec();
    loop {
        exchange(file, call, &mut words)?;
        let wanted = usize::try_from(word(&words, 0)).unwrap_or(usize::MAX);
        let wanted = wanted.div_ceil(WORD);
        if wanted <= words.len() {
            return Ok(words);
        }
        if wanted > MOST {
            return Err(Errno::EOVERFLOW.into());
        }
        words = question.to_vec();
        words.resize(wanted, 0);
    }
}

/// What `VFIO_DEVICE_GET_IRQ_INFO` says: flags and count.
pub(super) fn irq_info(device: &File, index: u32) -> io::Result<(u32, u32)> {
    let mut info = [0, 0, index, 0];
    exchange(device.as_fd(), DEVICE_GET_IRQ_INFO, &mut info)?;
    Ok((word(&info, 1), word(&info, 3)))
}

/// `VFIO_DEVICE_SET_IRQS`: has interrupts of `index` from `start` on signal these eventfds, or (`None`) nobody. All of an index that was off is
/// reserved up to the last one named.
///
/// # Errors
/// The kernel's; ENOSPC when it has not so many vectors.
pub(super) fn set_triggers<'a>(
    device: &File,
    index: u32,
    start: u32,
    events: impl Iterator<Item = Option<BorrowedFd<'a>>>,
) -> io::Result<()> {
    let mut words = vec![
        0,
        VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        start,
        0,
    ];
    let header = words.len();
    // A negative number: nobody.
    words.extend(events.map(|event| {
        event.map_or(u32::MAX, |event| {
            u32::from_ne_bytes(event.as_raw_fd().to_ne_bytes())
        })
    }));
    let count = words.len().saturating_sub(header);
    if let (Some(slot), Ok(count)) = (words.get_mut(4), u32::try_from(count)) {
        *slot = count;
    }
    match exchange(device.as_fd(), DEVICE_SET_IRQS, &mut words)? {
        0 => Ok(()),
        // So many vectors there would be.
        _ => Err(Errno::ENOSPC.into()),
    }
}

/// `VFIO_DEVICE_SET_IRQS`: switches all interrupts of `index` off.
pub(super) fn disable_interrupts(device: &File, index: u32) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    let mut words = [0, flags, index, 0, 0];
    exchange(device.as_fd(), DEVICE_SET_IRQS, &mut words).map(drop)
}

/// `VFIO_DEVICE_SET_IRQS`: unmasks the line, which the kernel masks with each interrupt.
pub(super) fn unmask_line(device: &File) -> io::Result<()> {
    use vfio_bindings::bindings::vfio::VFIO_PCI_INTX_IRQ_INDEX;
    let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;
    let mut words = [0, flags, VFIO_PCI_INTX_IRQ_INDEX, 0, 1];
    exchange(device.as_fd(), DEVICE_SET_IRQS, &mut words).map(drop)
}

/// `VFIO_DEVICE_SET_IRQS`: has the line unmasked whenever somebody writes to an eventfd, until it is switched off.
pub(super) fn unmask_line_by(device: &File, event: BorrowedFd<'_>) -> io::Result<()> {
    use vfio_bindings::bindings::vfio::VFIO_PCI_INTX_IRQ_INDEX;
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
    let event = u32::from_ne_bytes(event.as_raw_fd().to_ne_bytes());
    let mut words = [0, flags, VFIO_PCI_INTX_IRQ_INDEX, 0, 1, event];
    exchange(device.as_fd(), DEVICE_SET_IRQS, &mut words).map(drop)
}

/// `VFIO_DEVICE_RESET`.
pub(super) fn reset(device: &File) -> io::Result<()> {
    // SAFETY: there is no argument.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request(DEVICE_RESET)) };
    Ok(Errno::result(result).map(drop)?)
}

/// A device that a hot reset of another one reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Affected {
    pub group: u32,
    pub bdf: Bdf,
}

/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`: all devices that a reset of the bus reaches, this one included.
///
/// # Errors
/// ENODEV for a device that has no bus to reset.
pub(super) fn hot_reset_info(device: &File) -> io::Result<Vec<Affected>> {
    const HEADER: usize = 3;
    /// Functions on a bus.
    const MOST: usize = 256;
    let mut words = vec![0; HEADER];
    match exchange(device.as_fd(), DEVICE_GET_PCI_HOT_RESET_INFO, &mut words) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
            let count = usize::try_from(word(&words, 2)).unwrap_or(usize::MAX);
            if count > MOST {
                return Err(Errno::EOVERFLOW.into());
            }
            words = vec![0; HEADER.saturating_add(count.saturating_mul(2))];
            exchange(device.as_fd(), DEVICE_GET_PCI_HOT_RESET_INFO, &mut words)?;
        }
        other => {
            other?;
        }
    }
    Ok(affected(words.get(HEADER..).unwrap_or_default()))
}

/// Each entry: group; segment, bus and devfn.
fn affected(words: &[u32]) -> Vec<Affected> {
    words
        .chunks_exact(2)
        .map(|entry| {
            let [low, high, bus, devfn] = word(entry, 1).to_ne_bytes();
            Affected {
                group: word(entry, 0),
                bdf: Bdf::from_devfn(u16::from_ne_bytes([low, high]), bus, devfn),
            }
        })
        .collect()
}

/// `VFIO_DEVICE_PCI_HOT_RESET`: resets the bus, on the strength of owning these groups.
pub(super) fn hot_reset<'a>(
    device: &File,
    groups: impl Iterator<Item = BorrowedFd<'a>>,
) -> io::Result<()> {
    let mut words = vec![0; 3];
    words.extend(groups.map(|group| u32::from_ne_bytes(group.as_raw_fd().to_ne_bytes())));
    let count = words.len().saturating_sub(3);
    if let (Some(slot), Ok(count)) = (words.get_mut(2), u32::try_from(count)) {
        *slot = count;
    }
    exchange(device.as_fd(), DEVICE_PCI_HOT_RESET, &mut words).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_have_the_numbers_of_the_kernels_header() {
        assert_eq!(request(SET_IOMMU), 0x3b66);
        assert_eq!(request(DEVICE_SET_IRQS.0), 0x3b6e);
        assert_eq!(request(DEVICE_PCI_HOT_RESET.0), 0x3b71);
    }

    #[test]
    fn the_devices_that_a_hot_reset_reaches_are_read_from_the_kernels_answer() {
        let place = u32::from_ne_bytes([0x01, 0x00, 0x3a, 0x81]);
        assert_eq!(
            affected(&[12, place, 13]),
            [Affected {
                group: 12,
                bdf: "0001:3a:10.1".parse().unwrap()
            }]
        );
    }

    #[test]
    fn a_file_that_is_no_vfio_device_is_an_error_and_not_an_empty_answer() {
        let file = tempfile::tempfile().unwrap();
        assert!(device_info(&file).is_err());
        assert!(region_info(&file, 0).is_err());
        assert!(set_triggers(&file, 0, 0, std::iter::once(None)).is_err());
    }
}
