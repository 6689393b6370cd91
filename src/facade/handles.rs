//! What is open in the facade.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use fuser::FileHandle;
use nix::errno::Errno;

use super::view::{Open, lock};

/// What users other than root can have open at a time, all of them together. It costs the daemon memory, and for a driver's file a
/// descriptor: guests need those.
const OTHER_USERS: usize = 256;
const ROOT: u32 = 0;

/// Open files and directories, by the numbers that the kernel has for them.
#[derive(Default)]
pub(super) struct Handles(Mutex<Table>);

#[derive(Default)]
struct Table {
    open: HashMap<u64, (Arc<Open>, u32)>,
    last: u64,
    of_other_users: usize,
}

impl Handles {
    /// Keeps what `user` has opened.
    ///
    /// # Errors
    /// ENFILE when users other than root have too much open.
    pub fn keep(&self, open: Open, user: u32) -> Result<FileHandle, Errno> {
        let mut table = lock(&self.0);
        if user != ROOT {
            if table.of_other_users >= OTHER_USERS {
                return Err(Errno::ENFILE);
            }
            table.of_other_users = table.of_other_users.saturating_add(1);
        }
        table.last = table.last.wrapping_add(1);
        let handle = table.last;
        table.open.insert(handle, (Arc::new(open), user));
        Ok(FileHandle(handle))
    }

    /// What the kernel means.
    ///
    /// # Errors
    /// EBADF when there is nothing of that number.
    pub fn get(&self, handle: FileHandle) -> Result<Arc<Open>, Errno> {
        let table = lock(&self.0);
        let found = table.open.get(&handle.0).ok_or(Errno::EBADF)?;
        Ok(Arc::clone(&found.0))
    }

    /// It was closed.
    pub fn remove(&self, handle: FileHandle) {
        let mut table = lock(&self.0);
        if let Some((_, user)) = table.open.remove(&handle.0)
            && user != ROOT
        {
            table.of_other_users = table.of_other_users.saturating_sub(1);
        }
    }
}
