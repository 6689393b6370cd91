//! A facade for a daemon that runs in a mount namespace of its own, laid by a process outside.

use std::os::fd::OwnedFd;
use std::path::Path;

use super::mount::{self, MountName, Waiters};
use super::{DRIVERS, FacadeError};

/// A facade that this process has mounted for all to see, and that another one serves. Dropping it does not take it away.
#[derive(Debug)]
pub struct Outside {
    name: MountName,
}

impl Outside {
    /// Mounts it over `/sys/bus/pci/drivers`. Whoever gets the descriptor serves it, see [`super::serve`]; until then all who look into the directory
    /// wait. One that a dead process has left there is taken away first.
    ///
    /// # Errors
    /// Any [`FacadeError`] but [`FacadeError::Serve`] and [`FacadeError::Keeper`].
    pub fn lay() -> Result<(Self, OwnedFd), FacadeError> {
        let path = Path::new(DRIVERS);
        mount::open_beneath_dead_facades(path)?;
        let name = MountName::new();
        let fuse = mount::attach(path, name)?;
        Ok((Self { name }, fuse))
    }

    /// Takes it away. Those who wait for an answer of a daemon that lives get it.
    ///
    /// # Errors
    /// [`FacadeError::Unmount`], [`FacadeError::Open`], [`FacadeError::Proc`].
    pub fn take_away(self, daemon_lives: bool) -> Result<(), FacadeError> {
        let waiters = if daemon_lives {
            Waiters::Wait
        } else {
            Waiters::Fail
        };
        mount::unmount(Path::new(DRIVERS), self.name, waiters)
    }
}
