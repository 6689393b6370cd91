//! A xenstore client: nodes, permissions, transactions and watches, over xenstored's socket or the
//! kernel's device.
//!
//! ```no_run
//! use xenbus::xenstore::{Client, Store};
//! # fn main() -> Result<(), xenbus::xenstore::Error> {
//! let mut store = Client::connect()?;
//! store.watch("backend/pci", "pci")?;
//! store.transaction(|t| {
//!     let count = t.read_u32("backend/pci/5/0/num_devs")?;
//!     t.write("backend/pci/5/0/num_devs", count.saturating_add(1).to_string())
//! })?;
//! while let Some(event) = store.next_event()? {
//!     println!("{} has changed ({})", event.path, event.token);
//! }
//! # Ok(())
//! # }
//! ```

mod client;
mod connection;
mod error;
mod events;
mod perms;
mod store;
mod switch;
#[cfg(test)]
mod tests;
mod transaction;
mod transport;
pub mod wire;
#[cfg(feature = "xenstore-rs")]
mod xs;

pub use client::{Client, TRANSACTION_TRIES};
pub use connection::{DEFAULT_TIMEOUT, EVENTS_KEPT};
pub use error::{Error, Request};
pub use events::WatchEvent;
pub use perms::{Access, Perm};
pub use store::Store;
pub use switch::Switched;
pub use transaction::Transaction;
#[cfg(feature = "xenstore-rs")]
pub use xs::XsClient;
