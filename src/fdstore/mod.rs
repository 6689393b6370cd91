//! The descriptor store: descriptors that outlive the daemon, so that a restart of it goes unnoticed by whoever is at their other ends.
//! A tap exists for as long as somebody has it open, a pseudo-terminal and a connection as well.
//!
//! A small process keeps them, `pcibackd-fdstore`: the daemon's own program, run anew under another name. It holds descriptors
//! under names, and gives them back to the next daemon; it decides nothing. As a service it is a unit of its own, which systemd starts when
//! the daemon first connects to its socket, for what is started by a service ends with it. Elsewhere the daemon starts it. It ends when it
//! keeps nothing and nobody is connected.
//!
//! | module | holds |
//! |---|---|
//! | `process` | the process |
//! | `store` | the daemon's end |
//! | `wire` | what goes between the two |

mod process;
mod store;
mod wire;

pub use process::{listen, run_if_store, serve};
pub use store::{FdStore, FdStoreError, Starts};

/// Its socket in the run directory.
pub const SOCKET: &str = "fdstore";
