//! The kernel's announcements of devices that come and go (netlink, `NETLINK_KOBJECT_UEVENT`; Linux `lib/kobject_uevent.c`).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket,
};

/// The group that the kernel itself sends to; udev's own announcements go to another.
const KERNEL: u32 = 1;

/// A socket that becomes readable with each announcement. They are of all kinds of devices.
pub(super) fn listen() -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_quiet_until_the_kernel_announces_something() {
        let socket = listen().unwrap();
        let mut buffer = [0; 8192];
        match nix::unistd::read(&socket, &mut buffer) {
            Err(nix::errno::Errno::EAGAIN) => {}
            // This machine has a life of its own. An announcement begins with what happened, at which path.
            Ok(length) => assert!(buffer[..length].contains(&b'@')),
            Err(errno) => panic!("{errno}"),
        }
    }
}
