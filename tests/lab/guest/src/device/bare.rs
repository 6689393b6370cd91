//! A device through VFIO (Linux `include/uapi/linux/vfio.h`, `Documentation/driver-api/vfio.rst`), without anybody between.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::memory::{self, check, map};
use super::window::{Area, Door, Window};
use super::{Device, Recovery, Result, Signal};
use crate::memory::Memory;

/// `_IO(';', number)`.
const fn request(number: u32) -> libc::Ioctl {
    (0x3b << 8 | number) as libc::Ioctl
}

const SET_IOMMU: libc::Ioctl = request(102);
const GROUP_GET_STATUS: libc::Ioctl = request(103);
const GROUP_SET_CONTAINER: libc::Ioctl = request(104);
const GROUP_GET_DEVICE_FD: libc::Ioctl = request(106);
const DEVICE_GET_REGION_INFO: libc::Ioctl = request(108);
const DEVICE_SET_IRQS: libc::Ioctl = request(110);
const IOMMU_MAP_DMA: libc::Ioctl = request(113);

const TYPE1_V2_IOMMU: libc::c_ulong = 3;
const GROUP_VIABLE: u32 = 1;
const CONFIG_REGION: u32 = 7;
const REGION_MMAP: u32 = 1 << 2;
const DMA_READ_WRITE: u32 = 1 << 0 | 1 << 1;
const IRQ_DATA_NONE: u32 = 1 << 0;
const IRQ_DATA_EVENTFD: u32 = 1 << 2;
const IRQ_UNMASK: u32 = 1 << 4;
const IRQ_TRIGGER: u32 = 1 << 5;

#[repr(C)]
struct GroupStatus {
    size: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct RegionInfo {
    argument_size: u32,
    flags: u32,
    index: u32,
    capabilities: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
struct MapDma {
    size_of: u32,
    flags: u32,
    virtual_address: u64,
    bus_address: u64,
    size: u64,
}

/// More vectors than any driver here asks for.
const MOST_VECTORS: usize = 8;

#[repr(C)]
#[derive(Default)]
struct SetIrqs {
    size: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    descriptors: [i32; MOST_VECTORS],
}

const _: () = assert!(
    size_of::<RegionInfo>() == 32 && size_of::<MapDma>() == 32 && size_of::<SetIrqs>() == 20 + 32
);

/// See the module.
pub struct Bare {
    // Without container and group, in which it is, the device would be no more.
    _container: File,
    _group: File,
    device: File,
    memory: Memory,
    signal: Option<Signal>,
    events: Vec<OwnedFd>,
    /// What the line is unmasked by.
    end: Option<File>,
}

fn open(path: &str) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|error| format!("{path}: {error}").into())
}

/// An ioctl that takes a structure.
fn with<T>(file: &File, number: libc::Ioctl, what: &str, argument: &mut T) -> Result<()> {
    // SAFETY: each request here is used with the structure that it takes, whose first field says how large it is.
    let result = check(unsafe { libc::ioctl(file.as_raw_fd(), number, &raw mut *argument) });
    result.map_err(|error| format!("{what}: {error}"))?;
    Ok(())
}

impl Bare {
    pub fn open(bdf: &str) -> Result<Self> {
        let group = fs::read_link(format!("/sys/bus/pci/devices/{bdf}/iommu_group"))?;
        let number = group.file_name().and_then(|name| name.to_str());
        let container = open("/dev/vfio/vfio")?;
        let group = open(&format!(
            "/dev/vfio/{}",
            number.ok_or("a group has a number")?
        ))?;
        let mut status = GroupStatus { size: 8, flags: 0 };
        with(
            &group,
            GROUP_GET_STATUS,
            "VFIO_GROUP_GET_STATUS",
            &mut status,
        )?;
        if status.flags & GROUP_VIABLE == 0 {
            return Err("the group is not viable".into());
        }
        with(
            &group,
            GROUP_SET_CONTAINER,
            "VFIO_GROUP_SET_CONTAINER",
            &mut container.as_raw_fd(),
        )?;
        // SAFETY: it takes a number.
        check(unsafe { libc::ioctl(container.as_raw_fd(), SET_IOMMU, TYPE1_V2_IOMMU) })?;
        let (memory, _) = memory::shared()?;
        let mut part = MapDma {
            size_of: size_of::<MapDma>() as u32,
            flags: DMA_READ_WRITE,
            virtual_address: memory.base(),
            bus_address: memory.physical(0),
            size: memory::SIZE,
        };
        with(&container, IOMMU_MAP_DMA, "VFIO_IOMMU_MAP_DMA", &mut part)?;
        let name = std::ffi::CString::new(bdf)?;
        // SAFETY: it takes a string of C's.
        let raw = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) };
        let raw = check(raw).map_err(|error| format!("VFIO_GROUP_GET_DEVICE_FD: {error}"))?;
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        let device = unsafe { File::from_raw_fd(raw) };
        Ok(Self {
            _container: container,
            _group: group,
            device,
            memory,
            signal: None,
            events: Vec::new(),
            end: None,
        })
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        let mut region = RegionInfo {
            argument_size: size_of::<RegionInfo>() as u32,
            index,
            ..RegionInfo::default()
        };
        let what = "VFIO_DEVICE_GET_REGION_INFO";
        with(&self.device, DEVICE_GET_REGION_INFO, what, &mut region)?;
        Ok(region)
    }

    fn config(&self) -> Result<Region> {
        Ok(Region {
            file: self.device.try_clone()?,
            offset: self.region(CONFIG_REGION)?.offset,
        })
    }

    fn set_irqs(&self, signal: Signal, flags: u32, events: &[OwnedFd]) -> Result<()> {
        let mut set = SetIrqs {
            size: size_of::<SetIrqs>() as u32,
            flags,
            index: signal as u32,
            count: events.len() as u32,
            ..SetIrqs::default()
        };
        for (place, event) in set.descriptors.iter_mut().zip(events) {
            *place = event.as_raw_fd();
        }
        with(
            &self.device,
            DEVICE_SET_IRQS,
            "VFIO_DEVICE_SET_IRQS",
            &mut set,
        )
    }
}

/// A region of the device's file.
struct Region {
    file: File,
    offset: u64,
}

impl Door for Region {
    fn read(&self, offset: u64, width: u8) -> Result<u64> {
        let mut bytes = [0; 8];
        let part = bytes.get_mut(..usize::from(width)).ok_or("too wide")?;
        self.file
            .read_exact_at(part, self.offset.saturating_add(offset))?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, offset: u64, width: u8, value: u64) -> Result<()> {
        let bytes = value.to_le_bytes();
        let part = bytes.get(..usize::from(width)).ok_or("too wide")?;
        Ok(self
            .file
            .write_all_at(part, self.offset.saturating_add(offset))?)
    }
}

impl Device for Bare {
    fn config_read(&mut self, offset: u16, width: u8) -> Result<u32> {
        let value = self.config()?.read(offset.into(), width)?;
        Ok(u32::try_from(value)?)
    }

    fn config_write(&mut self, offset: u16, width: u8, value: u32) -> Result<()> {
        self.config()?.write(offset.into(), width, value.into())
    }

    fn window(&mut self, bar: u8) -> Result<Window> {
        let region = self.region(bar.into())?;
        let mut areas = Vec::new();
        if region.flags & REGION_MMAP != 0 {
            areas.push(Area {
                start: 0,
                size: region.size,
                base: map(&self.device, region.offset, usize::try_from(region.size)?)?,
            });
        }
        let door = Box::new(Region {
            file: self.device.try_clone()?,
            offset: region.offset,
        });
        Ok(Window { areas, door })
    }

    fn interrupts(&mut self, signal: Signal, count: u32) -> Result<()> {
        let events: Vec<_> = (0..count).map(|_| new_event()).collect::<Result<_>>()?;
        self.end = None;
        if let Some(former) = self.signal.take() {
            // None at all: the whole kind is switched off.
            self.set_irqs(former, IRQ_DATA_NONE | IRQ_TRIGGER, &[])?;
        }
        self.set_irqs(signal, IRQ_DATA_EVENTFD | IRQ_TRIGGER, &events)?;
        self.signal = Some(signal);
        self.events = events;
        Ok(())
    }

    fn wait(&mut self, vector: usize, patience: Duration) -> Result<bool> {
        let event = self.events.get(vector).ok_or("no such vector")?;
        Ok(wait(event, patience)?)
    }

    fn end_of_interrupt(&mut self) -> Result<()> {
        match (self.signal, &self.end) {
            (Some(Signal::Line), Some(end)) => {
                let mut end = end;
                Ok(end.write_all(&1u64.to_ne_bytes())?)
            }
            (Some(Signal::Line), None) => {
                // One, without data.
                let mut set = SetIrqs {
                    size: 20,
                    flags: IRQ_DATA_NONE | IRQ_UNMASK,
                    count: 1,
                    ..SetIrqs::default()
                };
                with(
                    &self.device,
                    DEVICE_SET_IRQS,
                    "VFIO_DEVICE_SET_IRQS",
                    &mut set,
                )
            }
            _ => Ok(()),
        }
    }

    fn end_by_event(&mut self) -> Result<()> {
        let end = [new_event()?];
        self.set_irqs(Signal::Line, IRQ_DATA_EVENTFD | IRQ_UNMASK, &end)?;
        [self.end] = end.map(|end| Some(end.into()));
        Ok(())
    }

    fn recovery_step(&mut self, _patience: Duration) -> Result<Option<Recovery>> {
        Err("VFIO asks nobody to recover".into())
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }
}

fn new_event() -> Result<OwnedFd> {
    // SAFETY: it takes two numbers.
    let raw = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Waits for an event and takes it; false when none came in time.
fn wait(event: &OwnedFd, patience: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let milliseconds = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one structure, as it says.
    if check(unsafe { libc::poll(&raw mut poll, 1, milliseconds) })? == 0 {
        return Ok(false);
    }
    let mut count = [0u8; 8];
    // SAFETY: 8 bytes are there to be written to.
    let result = unsafe { libc::read(event.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
    Ok(result == 8)
}
