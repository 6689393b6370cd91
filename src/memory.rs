//! Keeping the daemon small.

use log::warn;
use nix::libc;

/// As malloc has it before it adapts.
const LARGE: libc::c_int = 128 * 1024;

/// Makes the process take memory page by page, and give it back. To be called before there is a thread.
///
/// A facade's buffers are 16 MiB each, of which two pages are used. malloc maps such a buffer, but once one was freed takes the next from a heap, and there
/// clears it: commands run with a facade of their own added up to 32 MiB. And where transparent huge pages are always used, a thread's stack or such a
/// buffer is 2 MiB from its first byte on.
pub fn keep_small() {
    // SAFETY: sets a number in malloc's parameters, and no other thread runs that could be in malloc.
    if unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) } == 0 {
        warn!("malloc refuses to map large buffers; the daemon may grow by 16 MiB");
    }
    if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
        warn!("cannot do without huge pages ({error}); the daemon may grow by some MiB");
    }
}
