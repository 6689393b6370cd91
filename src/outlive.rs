//! Being a process that outlives the daemon, which has run its own program anew under another name.

use std::ffi::CStr;
use std::os::fd::RawFd;
use std::{env, fs, io};

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::unistd;

/// Leaves behind what could end this process together with the daemon, or be held open by it. To be called before there is a thread.
pub(crate) fn settle(name: &CStr) -> io::Result<()> {
    SigSet::all().thread_block()?;
    // EPERM: leads a session already
    if let Err(error) = unistd::setsid()
        && error != Errno::EPERM
    {
        return Err(error.into());
    }
    env::set_current_dir("/")?;
    // cosmetic: it runs as well under another name
    let _ = prctl::set_name(name);
    // short of memory, Linux shall end something else; it may only be told so by root
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    close_all_but_standard()
}

fn close_all_but_standard() -> io::Result<()> {
    let mut open = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        open.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|number| number.parse::<RawFd>().ok()),
        );
    }
    for number in open.into_iter().filter(|number| *number > 2) {
        // EBADF: the one that the list was read by
        let _ = unistd::close(number);
    }
    Ok(())
}
