//! The control socket, `RUN_DIR/control.sock`: what `pciback` asks of the daemon.

pub mod client;
pub mod policy;
pub mod protocol;
pub mod server;
pub mod traced;
pub mod virtio;

/// The socket's name in the run directory.
pub const SOCKET: &str = "control.sock";
