//! The host's side: a tap, or anything else that takes and gives packets.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::net::if_::if_nametoindex;

use super::feature;
use crate::features::Features;

/// What a packet goes through, one in a call, each after a `virtio_net_hdr`.
#[derive(Debug)]
pub struct Link {
    file: File,
    is_tap: bool,
}

/// A tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is no such network device.
    #[error(
        "there is no network device {name}: make it with `ip tuntap add {name} mode tap multi_queue`"
    )]
    Missing {
        /// Its name.
        name: String,
    },
    /// Another program has it.
    #[error("the tap {name} is in use: stop the guest or program that has it")]
    Busy {
        /// Its name.
        name: String,
    },
    /// It has one queue, or it is no tap.
    #[error(
        "{name} is no tap with {queues} queues: remove it and make it with `ip tuntap add {name} mode tap{}`",
        if *queues > 1 { " multi_queue" } else { "" }
    )]
    Kind {
        /// Its name.
        name: String,
        /// How many queues are wanted.
        queues: u16,
    },
    /// Something else.
    #[error(
        "cannot open the tap {name}: this takes /dev/net/tun (modprobe tun) and the capability CAP_NET_ADMIN"
    )]
    Open {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Flags of TUNSETOFFLOAD (Linux `if_tun.h`): what the reader of the tap takes.
const OFFLOADS: [(Features, libc::c_uint); 4] = [
    (feature::GUEST_CSUM, libc::TUN_F_CSUM),
    (feature::GUEST_TSO4, libc::TUN_F_TSO4),
    (feature::GUEST_TSO6, libc::TUN_F_TSO6),
    (feature::GUEST_ECN, libc::TUN_F_TSO_ECN),
];

impl Link {
    /// The queues of the tap `name`, which exists already.
    ///
    /// # Errors
    /// It does not exist, is in use, or has too few queues.
    pub fn tap(name: &str, queues: u16) -> Result<Vec<Self>, LinkError> {
        // Linux would make one, which nobody has given an address or a bridge.
        if if_nametoindex(name).is_err() {
            return Err(LinkError::Missing { name: name.into() });
        }
        Self::make_tap(name, queues)
    }

    /// The queues of a tap that is made, and is there for as long as somebody has one of them.
    ///
    /// # Errors
    /// The name is in use, or taps are beyond us.
    pub fn make_tap(name: &str, queues: u16) -> Result<Vec<Self>, LinkError> {
        (0..queues)
            .map(|_| Self::tap_queue(name, queues > 1))
            .collect::<io::Result<_>>()
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EBUSY) => LinkError::Busy { name: name.into() },
                Some(libc::EINVAL | libc::E2BIG) => LinkError::Kind {
                    name: name.into(),
                    queues,
                },
                _ => LinkError::Open {
                    name: name.into(),
                    source,
                },
            })
    }

    fn tap_queue(name: &str, multi_queue: bool) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let link = Self { file, is_tap: true };
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if multi_queue {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        link.request(libc::TUNSETIFF, name, flags)?;
        Ok(link)
    }

    /// A tap's queue that was opened before.
    ///
    /// # Errors
    /// Its flags cannot be changed.
    pub fn of_tap(queue: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            is_tap: true,
            ..Self::of_socket(queue)?
        })
    }

    /// Whether there still is a tap of which it is a queue: somebody may have taken it away.
    pub fn is_of_tap(&self) -> bool {
        self.request(libc::TUNGETIFF, "", 0).is_ok()
    }

    /// A socket that keeps packets apart, at whose other end somebody reads and writes them with their
    /// headers.
    ///
    /// # Errors
    /// Its flags cannot be changed.
    pub fn of_socket(socket: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self {
            file: socket.into(),
            is_tap: false,
        })
    }

    /// Has the kernel use headers of `header` bytes, and leave to the guest what it has agreed to do.
    pub(super) fn configure(&self, header: usize, features: Features) -> io::Result<()> {
        if !self.is_tap {
            return Ok(());
        }
        let header = header as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &header) })?;
        let offloads = OFFLOADS
            .iter()
            .filter(|(feature, _)| features.contains(*feature))
            .fold(0, |sum, (_, flag)| sum | flag);
        let offloads = libc::c_ulong::from(offloads);
        // SAFETY: TUNSETOFFLOAD takes its argument as a number.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) })
    }

    /// Whether the kernel puts packets into this queue of several.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        if !self.is_tap {
            return Ok(());
        }
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        match self.request(libc::TUNSETQUEUE, "", flag) {
            // It is so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            done => done,
        }
    }

    /// An ioctl with a name and flags.
    fn request(&self, number: libc::Ioctl, name: &str, flags: libc::c_int) -> io::Result<()> {
        let mut request = libc::ifreq {
            ifr_name: [0; libc::IFNAMSIZ],
            ifr_ifru: libc::__c_anonymous_ifr_ifru {
                ifru_flags: flags as libc::c_short,
            },
        };
        // One byte stays zero, which ends the name.
        let places = request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1);
        for (place, byte) in places.zip(name.bytes()) {
            *place = byte as libc::c_char;
        }
        // SAFETY: TUNSETIFF and TUNSETQUEUE read a `struct ifreq`; the former and TUNGETIFF write one.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), number, &mut request) })
    }

    /// The next packet with its header, cut off where `data` ends.
    pub(super) fn receive(&self, data: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(data)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
