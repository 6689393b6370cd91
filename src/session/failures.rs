//! Devices that a guest could not be given: told in `error-N`, in the backend's error node and in the status, for as long as the toolstack
//! has them in its list.

use log::error;
use xenbus::XenbusState;
use xenbus::xenstore::Store;

use super::nodes::{self, DeviceNode, optional};
use super::{Session, SessionError};
use crate::text::printable;

/// What is told of a device that failed: it must fit into a node, whatever the toolstack wrote.
const LONGEST_REASON: usize = 400;

/// The devices that failed.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// Device, as `dev-N` has it, and reason.
    list: Vec<(String, String)>,
    /// Nodes of ours may be where they do not belong.
    unsettled: bool,
}

impl Failures {
    /// Device and reason.
    pub(super) fn list(&self) -> &[(String, String)] {
        &self.list
    }

    fn add(&mut self, device: String, why: String) {
        self.list.retain(|(other, _)| *other != device);
        self.list.push((device, why));
        self.unsettled = true;
    }

    fn of(&self, node: &DeviceNode) -> Option<&str> {
        let device = label(node);
        let failed = self.list.iter().find(|(other, _)| *other == device);
        failed
            .filter(|_| node.state == XenbusState::Closed)
            .map(|(_, why)| why.as_str())
    }
}

/// A device as it is told of.
fn label(node: &DeviceNode) -> String {
    match &node.address {
        Ok(bdf) => bdf.to_string(),
        Err(text) => short(text),
    }
}

fn short(text: &str) -> String {
    printable(text).chars().take(LONGEST_REASON).collect()
}

impl Session {
    /// After a restart: those that an earlier daemon told of.
    pub(super) fn restore_failures(&mut self, nodes: &[DeviceNode]) -> Result<(), SessionError> {
        for node in nodes
            .iter()
            .filter(|node| node.state == XenbusState::Closed)
        {
            let path = self.paths.indexed("error", node.n);
            if let Some(why) = optional(self.store.read_string(&path))? {
                self.failures.add(label(node), short(&why));
            }
        }
        self.failures.unsettled = true;
        Ok(())
    }

    /// Tells that a device failed. The others go on.
    pub(super) fn fail_device(&mut self, node: &DeviceNode, why: &str) -> Result<(), SessionError> {
        let (device, why) = (label(node), short(why));
        error!("domain {}: cannot have {device}: {why}", self.setup.domain);
        let state = XenbusState::Closed.number().to_string();
        self.write_device(node, &[("error", &why), ("state", &state)])?;
        self.store.write(
            &self.paths.error,
            format!("{} {device}: {why}", libc::EINVAL),
        )?;
        self.failures.add(device, why);
        Ok(())
    }

    /// Forgets what the toolstack has taken off its list, and has each `error-N` beside its device: the toolstack renumbers its nodes, and
    /// knows nothing of ours.
    pub(super) fn settle_failures(&mut self) -> Result<(), SessionError> {
        if !self.failures.unsettled {
            return Ok(());
        }
        // At one moment: a device that the toolstack moves to another number meanwhile would be in none, and forgotten for good.
        let paths = &self.paths;
        let nodes = self.store.transaction(|t| nodes::devices(t, paths))?;
        let there = |(device, _): &(String, String)| {
            let mut failed = nodes.iter().filter(|n| n.state == XenbusState::Closed);
            failed.any(|node| label(node) == *device)
        };
        self.failures.list.retain(there);
        for n in nodes::errors(&mut self.store, &self.paths)? {
            let node = nodes.iter().find(|node| node.n == n);
            if node.and_then(|node| self.failures.of(node)).is_none() {
                nodes::remove(&mut self.store, &self.paths.indexed("error", n))?;
            }
        }
        for node in &nodes {
            let path = self.paths.indexed("error", node.n);
            if let Some(why) = self.failures.of(node)
                && optional(self.store.read_string(&path))?.as_deref() != Some(why)
            {
                nodes::write_device(&mut self.store, &self.paths, node, &[("error", why)])?;
            }
        }
        self.failures.unsettled = !self.failures.list.is_empty();
        Ok(())
    }
}
