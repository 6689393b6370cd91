//! The topologies that `pciback set --guest` has set: for guests by their names, until the host is booted anew.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use log::warn;

use super::lock_of;
use crate::config::{Live, Topology};

const FILE: &str = "topologies.json";
/// Names for which something is set. More are a mistake.
const MOST: usize = 1000;

/// Where they are written down, for the next daemon.
#[derive(Debug)]
pub(super) struct Topologies {
    path: PathBuf,
    live: Arc<Live>,
    /// Held while they are changed.
    changing: Mutex<()>,
}

impl Topologies {
    /// Takes up what an earlier daemon has written down.
    pub(super) fn take_up(run_dir: &Path, live: Arc<Live>) -> Self {
        let path = run_dir.join(FILE);
        let found = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error),
        };
        match found {
            Ok(found) => live.set_topologies(found),
            Err(error) => warn!(
                "{}: {error}; topologies that were set at run time are as in the configuration file, set them again (pciback set --guest)",
                path.display()
            ),
        }
        Self {
            path,
            live,
            changing: Mutex::default(),
        }
    }

    /// Sets a guest's; `None`: as the configuration file says.
    ///
    /// # Errors
    /// When it cannot be written down; nothing has changed then.
    pub(super) fn set(&self, guest: &str, topology: Option<Topology>) -> io::Result<()> {
        let _alone = lock_of(&self.changing);
        let mut all = self.live.topologies();
        match topology {
            Some(topology) => all.insert(guest.to_owned(), topology),
            None => all.remove(guest),
        };
        if all.len() > MOST {
            return Err(io::Error::other(format!(
                "something is set for {MOST} guests already: take back what is not needed (topology=default)"
            )));
        }
        // Whole or not at all, whenever the daemon is killed.
        let new = self.path.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec(&all)?)?;
        fs::rename(&new, &self.path)?;
        self.live.set_topologies(all);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_is_there_for_the_next_daemon_until_it_is_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let start = || {
            let live = Arc::new(Live::default());
            let topologies = Topologies::take_up(directory.path(), Arc::clone(&live));
            (live, topologies)
        };
        let (live, topologies) = start();
        topologies.set("a", Some(Topology::Passthrough)).unwrap();
        topologies.set("b\n", Some(Topology::Vpci)).unwrap();
        let set = live.topologies();
        assert_eq!(set.len(), 2);
        let (live, topologies) = start();
        assert_eq!(live.topologies(), set);
        topologies.set("a", None).unwrap();
        topologies.set("b\n", None).unwrap();
        assert_eq!(start().0.topologies(), BTreeMap::new());
    }

    #[test]
    fn a_broken_file_is_as_none() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE), "{\"a\": \"round\"}").unwrap();
        let live = Arc::new(Live::default());
        Topologies::take_up(directory.path(), Arc::clone(&live));
        assert_eq!(live.topologies(), BTreeMap::new());
    }
}
