//! `/sys/bus/pci/drivers/pciback` without a kernel driver of that name.
//!
//! `xl`, libvirt and others look for assignable devices in the directory of the kernel's `pciback` driver, and write to its files. User space cannot make
//! such a directory in sysfs. So a FUSE file system lies over `/sys/bus/pci/drivers`: `pciback` in it is ours and goes to a [`Driver`], everything else
//! goes through to the real directory ([`RealDrivers`]), so that `/sys/bus/pci/devices/BDF/driver` leads to the same path with and without us.
//!
//! **Never dead.** A FUSE mount whose server is gone answers ENOTCONN for ever, and with it every driver would be out of reach. A small process, the
//! keeper, unmounts it when the daemon dies, however it dies. The daemon starts another one when the keeper dies first ([`Facade::keeper`]).
//!
//! **Never waiting for itself.** A process must not walk into a file system that it serves. The daemon reaches drivers through [`RealDrivers`] only.
//!
//! **Never stuck.** One thread answers whatever is quick: lookups, listings, links, attributes, our own files' contents. What another driver or the hardware
//! may take long over (all writes, and reads of other drivers' files) runs on up to 16 further threads, which come and go with the work. So a `bind` that
//! takes seconds holds up nothing but itself and, on kernels before 6.2, other writes to the very same file.
//!
//! [`Facade`] lays it over the directory for all to see; [`exec`] for one command only, in a mount namespace of its own. Where the daemon itself is in a
//! mount namespace of its own, another process lays it for all to see ([`Outside`]), and is its keeper.

#![deny(unsafe_code)]

mod attribute;
mod driver;
mod exec;
mod filesystem;
mod handles;
mod keeper;
mod laid;
mod mount;
mod outside;
mod pool;
mod real;
mod server;
mod stat;
mod tree;
mod view;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

pub use driver::Driver;
pub use exec::{ExecError, exec, mount_here};
pub use keeper::run_if_keeper;
pub use laid::{Laid, laid_over};
pub use outside::Outside;
pub use real::{DRIVERS, RealDrivers};
pub use server::{Server, serve};

use keeper::Keeper;
use mount::{MountName, Waiters};

/// Something about the facade failed.
#[derive(Debug, thiserror::Error)]
pub enum FacadeError {
    /// A directory of sysfs.
    #[error("cannot open {}; is sysfs mounted?", path.display())]
    Open {
        /// Which one.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// A file of ours in /proc.
    #[error("cannot read this process's mounts in /proc; is it mounted?")]
    Proc(#[source] io::Error),
    /// No FUSE in this kernel.
    #[error(
        "cannot use /dev/fuse: `modprobe fuse` makes it available, facade = \"off\" does without the facade (then `xl` does not see the devices)"
    )]
    NoFuse(#[source] Errno),
    /// The mount failed.
    #[error("cannot mount the facade over {}", path.display())]
    Mount {
        /// Over what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// A facade could not be taken away.
    #[error("cannot unmount the facade from {}", path.display())]
    Unmount {
        /// From where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// There is one already, and it is alive.
    #[error("the facade over {} is served by process {process}: stop that one first, or set facade = \"private\" or \"off\" here", path.display())]
    Served {
        /// Over what.
        path: PathBuf,
        /// By whom.
        process: u32,
    },
    /// It was mounted, but not served.
    #[error("cannot serve the facade")]
    Serve(#[source] io::Error),
    /// The process that would unmount it.
    #[error("cannot start the process that unmounts the facade should the daemon die")]
    Keeper(#[source] io::Error),
}

/// The facade over `/sys/bus/pci/drivers`, for everybody on the machine. Unmounted on drop, and by the keeper if it does not come to that.
#[derive(Debug)]
pub struct Facade {
    real: RealDrivers,
    name: MountName,
    server: Server,
    keeper: Keeper,
}

impl Facade {
    /// Starts the keeper, mounts, serves.
    ///
    /// # Errors
    /// Any [`FacadeError`]; nothing is left mounted.
    pub fn lay(real: RealDrivers, driver: Arc<dyn Driver>) -> Result<Self, FacadeError> {
        let name = MountName::new();
        // first, so that there is no moment at which nobody would unmount
        let keeper = Keeper::start(real.path(), name)?;
        let fuse = mount::attach(real.path(), name)?;
        let path = real.path().to_owned();
        // should the server give up, nobody is to wait for it
        let end = move || unmount(&path, name, Waiters::Fail);
        match server::serve_until(fuse, driver, real.clone(), end) {
            Ok(server) => Ok(Self {
                real,
                name,
                server,
                keeper,
            }),
            Err(error) => {
                unmount(real.path(), name, Waiters::Fail);
                Err(error)
            }
        }
    }

    /// Becomes readable when the keeper has died: to be answered with [`Facade::revive_keeper`].
    pub fn keeper(&self) -> BorrowedFd<'_> {
        self.keeper.as_fd()
    }

    /// Starts another keeper. [`Facade::keeper`] is another descriptor from then on.
    ///
    /// # Errors
    /// [`FacadeError::Keeper`]; the facade goes on without.
    pub fn revive_keeper(&mut self) -> Result<(), FacadeError> {
        self.keeper = Keeper::start(self.real.path(), self.name)?;
        Ok(())
    }

    /// Whether it is gone: somebody else unmounted it, or its server gave up.
    pub fn is_gone(&self) -> bool {
        self.server.is_finished()
    }
}

impl Drop for Facade {
    fn drop(&mut self) {
        // those who wait for an answer get it for as long as this process lives
        unmount(self.real.path(), self.name, Waiters::Wait);
    }
}

fn unmount(path: &Path, name: MountName, waiters: Waiters) {
    if let Err(error) = mount::unmount(path, name, waiters) {
        let path = path.display();
        log::error!("{error}; `umount -l {path}` takes it away by hand");
    }
}
