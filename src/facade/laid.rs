//! What lies over the PCI drivers' directory, for those who only look.

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::FacadeError;
use super::mount::{facade_of, open_path};

/// What lies over the directory of PCI drivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Laid {
    /// No facade.
    No,
    /// A facade that is served.
    Alive {
        /// By whom.
        process: u32,
    },
    /// A facade whose server runs and does not answer.
    Silent {
        /// Whose.
        process: u32,
    },
    /// A facade whose server is gone.
    Dead,
}

/// Looks at the directory that a facade may have been laid over. Changes nothing.
///
/// # Errors
/// [`FacadeError::Open`], [`FacadeError::Proc`].
pub fn laid_over(path: &Path) -> Result<Laid, FacadeError> {
    let directory = open_path(path).map_err(|source| FacadeError::Open {
        path: path.to_owned(),
        source,
    })?;
    let Some(name) = facade_of(&directory).map_err(FacadeError::Proc)? else {
        return Ok(Laid::No);
    };
    Ok(match name.owner() {
        None => Laid::Dead,
        Some(process) if answers(path) => Laid::Alive { process },
        Some(process) => Laid::Silent { process },
    })
}

/// Whether the directory can be listed in time. Asked on a thread of its own, which may wait for ever.
fn answers(path: &Path) -> bool {
    const PATIENCE: Duration = Duration::from_secs(2);
    let (done, wait) = mpsc::channel();
    let path = path.to_owned();
    thread::spawn(move || {
        // Whoever waits may have given up.
        let _ = done.send(fs::read_dir(path).is_ok());
    });
    wait.recv_timeout(PATIENCE).unwrap_or(false)
}
