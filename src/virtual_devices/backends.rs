//! What the host has for a device: a disk's image, a card's tap, a console's pseudo-terminal.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::{fs, iter};

use nix::net::if_::if_nametoindex;
use virtio::blk::{self, Blk, Image, ImageError};
use virtio::console::{self, Endpoint};
use virtio::device::Device;
use virtio::net::{Link, LinkError, Net};
use virtio::rng::Rng;
use xenbus::DomId;

use super::kept::KeptFds;
use super::place::At;
use crate::command;
use crate::config::{Card, CardLink, Console, Disk, HostPath, Interface, Mac, Model};

/// What a device is made of is not there, or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A disk's image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The sandbox of the unit is in the way.
    #[error(
        "pcibackd runs as a service that may not use {path} (/home is read-only for it): keep the image elsewhere, or give it \
         ReadWritePaths= (systemctl edit pcibackd), or make it a read_only disk"
    )]
    Sandbox {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A card's tap.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A card's bridge.
    #[error(
        "there is no bridge {bridge}: make it with `ip link add {bridge} type bridge && ip link set {bridge} up`, or name another one"
    )]
    NoBridge {
        /// Its name.
        bridge: String,
    },
    /// A tap does not come into its bridge.
    #[error("cannot put {tap} into the bridge {bridge}; `ip link show {bridge}` shows its state")]
    Bridge {
        /// The tap's name.
        tap: String,
        /// The bridge's name.
        bridge: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A socket.
    #[error(
        "cannot listen at {path}: its directory must be there, and nothing else may be at the path"
    )]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something that every host has.
    #[error("the host has no {what}")]
    Host {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A device, and what of it there is to tell of at the host's end.
pub(super) struct Backend {
    pub device: Box<dyn Device>,
    /// A console's pseudo-terminals, and the names of their ports.
    pub terminals: Vec<Terminal>,
}

/// A port's other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Terminal {
    /// The port's name; of a console none.
    pub port: Option<String>,
    /// `/dev/pts/N`.
    pub path: PathBuf,
}

impl From<Box<dyn Device>> for Backend {
    fn from(device: Box<dyn Device>) -> Self {
        Self {
            device,
            terminals: Vec::new(),
        }
    }
}

/// Opens what the device in a guest's place is made of. Nothing of it is used before its driver is there.
///
/// # Errors
/// [`BackendError`].
pub(super) fn open(
    model: &Model,
    domain: DomId,
    guest: &str,
    kept: &KeptFds,
) -> Result<Backend, BackendError> {
    let host = |what| move |source| BackendError::Host { what, source };
    match model {
        Model::Rng {} => {
            let rng = Rng::new().map_err(no_random_numbers)?;
            Ok((Box::new(rng) as Box<dyn Device>).into())
        }
        Model::Blk(disk) => {
            let disk = open_disk(disk).map_err(|error| explain(error, command::is_service()))?;
            Ok((Box::new(disk) as Box<dyn Device>).into())
        }
        Model::Net(card) => {
            let place = kept.place();
            let mac = address(card, guest, &place);
            let links = open_links(card, &format!("vif{domain}.{place}"), kept)?;
            let net = Net::new(links, mac.bytes()).map_err(host("thread for a network card"))?;
            Ok((Box::new(offloading(net, card)) as Box<dyn Device>).into())
        }
        Model::Console(console) => open_console(console, kept),
    }
}

/// What can be seen of the device in a guest's place while what it is made of is gone.
///
/// # Errors
/// The host has nothing left for it.
pub(super) fn stand_in(
    model: &Model,
    guest: &str,
    at: At,
) -> Result<Box<dyn Device>, BackendError> {
    Ok(match model {
        Model::Rng {} => Box::new(Rng::new().map_err(no_random_numbers)?),
        Model::Blk(disk) => Box::new(Blk::without_image(disk.read_only, &options(disk))),
        Model::Net(card) => {
            let mac = address(card, guest, &at.tag()).bytes();
            let net = Net::without_links(card.queues.get().into(), mac);
            Box::new(offloading(net, card))
        }
        Model::Console(console) => {
            let ports = console.ports.len().saturating_add(1);
            let console = console::Console::without_ports(ports).map_err(no_console_thread)?;
            Box::new(console)
        }
    })
}

fn no_random_numbers(source: io::Error) -> BackendError {
    let what = "source of random numbers";
    BackendError::Host { what, source }
}

fn no_console_thread(source: io::Error) -> BackendError {
    let what = "thread for a console";
    BackendError::Host { what, source }
}

fn address(card: &Card, guest: &str, place: &str) -> Mac {
    card.mac.unwrap_or_else(|| default_mac(guest, place))
}

fn offloading(net: Net, card: &Card) -> Net {
    if card.offloads {
        net
    } else {
        net.without_offloads()
    }
}

fn open_disk(disk: &Disk) -> Result<Blk, ImageError> {
    let image = Image::open(&disk.path, disk.read_only, disk.direct)?;
    Ok(Blk::new(image, &options(disk)))
}

fn options(disk: &Disk) -> blk::Options {
    blk::Options {
        queues: disk.queues.get().into(),
        serial: disk.serial.as_str().to_owned(),
        ..blk::Options::default()
    }
}

/// Where it is the sandbox that does not let us, that is not to be found by looking at the image.
fn explain(error: ImageError, is_service: bool) -> BackendError {
    match error {
        ImageError::Open { path, source }
            if is_service && matches!(source.raw_os_error(), Some(libc::EROFS | libc::EPERM)) =>
        {
            BackendError::Sandbox { path, source }
        }
        error => error.into(),
    }
}

/// Always the same for a guest's slot, and another one on another host.
fn default_mac(guest: &str, place: &str) -> Mac {
    let host = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    Mac::derived(&[host.trim(), guest, place])
}

fn open_links(card: &Card, own: &str, kept: &KeptFds) -> Result<Vec<Link>, BackendError> {
    let queues = card.queues.get().into();
    if let Some(links) = kept.links(queues) {
        return Ok(links);
    }
    let links = match &card.link {
        CardLink::Tap(tap) => Link::tap(tap.as_str(), queues)?,
        CardLink::Bridge(bridge) => {
            if if_nametoindex(bridge.as_str()).is_err() {
                let bridge = bridge.as_str().to_owned();
                return Err(BackendError::NoBridge { bridge });
            }
            let links = Link::make_tap(own, queues)?;
            join(own, bridge)?;
            links
        }
    };
    kept.keep_links(&links);
    Ok(links)
}

/// Of the host's end, as with the toolstack's own scripts. A bridge takes on the lowest address of its ports: this is never it, unless there is
/// no other, and then it is the same after a restart, and what the guest knows of the bridge stays true.
const HOST_END: &str = "fe:ff:ff:ff:ff:ff";

/// As the toolstack's own scripts do it.
fn join(tap: &str, bridge: &Interface) -> Result<(), BackendError> {
    let words = [
        "ip",
        "link",
        "set",
        "dev",
        tap,
        "address",
        HOST_END,
        "master",
        bridge.as_str(),
        "up",
    ];
    command::on_the_host_to_its_end(&words.map(str::to_owned)).map_err(|source| {
        BackendError::Bridge {
            tap: tap.to_owned(),
            bridge: bridge.as_str().to_owned(),
            source,
        }
    })
}

fn open_console(console: &Console, kept: &KeptFds) -> Result<Backend, BackendError> {
    let named = console.ports.iter();
    let all = iter::once((None, &console.socket))
        .chain(named.map(|port| (Some(port.name.as_str()), &port.socket)));
    let mut terminals = Vec::new();
    let mut ports = Vec::new();
    for (port, (name, socket)) in all.enumerate() {
        let endpoint = match socket {
            Some(path) => match kept.socket(port, path) {
                Some(endpoint) => endpoint,
                None => kept.keep_socket(port, listen(path)?),
            },
            None => {
                let (endpoint, path) = match kept.terminal(port) {
                    Some(terminal) => terminal,
                    None => kept.keep_terminal(port, Endpoint::pty().map_err(no_terminal)?),
                };
                let port = name.map(str::to_owned);
                terminals.push(Terminal { port, path });
                endpoint
            }
        };
        let name = name.unwrap_or_default().to_owned();
        ports.push(console::Port { name, endpoint });
    }
    let console = console::Console::new(ports).map_err(no_console_thread)?;
    Ok(Backend {
        device: Box::new(console),
        terminals,
    })
}

fn no_terminal(source: io::Error) -> BackendError {
    BackendError::Host {
        what: "pseudo-terminal",
        source,
    }
}

fn listen(path: &HostPath) -> Result<Endpoint, BackendError> {
    remove_left_over(path);
    Endpoint::listen(path).map_err(|source| BackendError::Socket {
        path: path.to_path_buf(),
        source,
    })
}

/// Whether there is a socket at a path.
pub(super) fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// A socket at which nobody listens: a daemon that was killed has left it.
fn remove_left_over(path: &Path) {
    if is_socket(path)
        && UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        // If it cannot be removed, that is told as a path that is taken.
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_the_sandbox_keeps_away_is_told_apart_from_one_that_is_missing() {
        let error = |errno| ImageError::Open {
            path: "/home/disk.img".into(),
            source: io::Error::from_raw_os_error(errno),
        };
        let sandboxed = explain(error(libc::EROFS), true);
        assert!(sandboxed.to_string().contains("ReadWritePaths="));
        for other in [
            explain(error(libc::ENOENT), true),
            explain(error(libc::EROFS), false),
        ] {
            assert!(matches!(other, BackendError::Image(_)));
        }
    }
}
