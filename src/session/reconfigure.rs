//! Devices that come to the guest, and go.

use conf_space::address::Bdf;
use log::{debug, error, info};
use xenbus::XenbusState;
use xenbus::xenstore::Store;

use super::nodes::{self, DeviceNode};
use super::{Session, SessionError};
use crate::text::{chain, printable};

/// What is told of a device that failed: it must fit into a node, whatever the toolstack wrote.
const LONGEST_REASON: usize = 400;

impl Session {
    /// After a restart: takes up the devices that the guest has, as their records say, and lets go of those that were taken from it
    /// meanwhile.
    pub(super) fn restore_exports(&mut self) -> Result<(), SessionError> {
        let domain = self.setup.domain;
        let nodes = nodes::devices(&mut self.store, &self.paths)?;
        for device in self.setup.devices.list() {
            let bdf = device.bdf;
            if !device.is_held_by(domain) {
                continue;
            }
            if !nodes.iter().any(|node| node.address == Ok(bdf)) {
                info!("domain {domain}: {bdf} was taken away");
                self.setup.devices.release(&device);
            } else if let Err(error) = self.exports.add(bdf, None) {
                // It stays the guest's: taking it away would be worse.
                let why = chain(&error);
                error!("domain {domain}: {bdf} cannot be served again: {why}");
                self.failed.push((bdf.to_string(), why));
            }
        }
        Ok(())
    }

    /// Exports what the toolstack marked 1 and takes away what it marked 5. A device that fails is told of, and the others go on.
    pub(super) fn reconfigure(&mut self) -> Result<(), SessionError> {
        let nodes = nodes::devices(&mut self.store, &self.paths)?;
        for node in &nodes {
            match node.state {
                XenbusState::Initialising => self.export(node)?,
                XenbusState::Closing => self.take_away(node)?,
                _ => {}
            }
        }
        if !self.without_node(&nodes).is_empty() {
            self.take_away_without_node()?;
        }
        for root in self.exports.topology().roots() {
            nodes::publish_root(&mut self.store, &self.paths, root.segment, root.bus)?;
        }
        Ok(())
    }

    fn export(&mut self, node: &DeviceNode) -> Result<(), SessionError> {
        let domain = self.setup.domain;
        let bdf = match &node.address {
            Ok(bdf) => *bdf,
            Err(text) => {
                return self.fail_device(
                    node,
                    text,
                    "is no PCI address: domain:bus:device.function, as in 0000:03:00.0",
                );
            }
        };
        match self.exports.add(bdf, node.wished) {
            Ok(seen_as) => {
                info!("domain {domain}: {bdf} is {seen_as} in the guest");
                self.store.write(
                    &self.paths.indexed("vdev", node.n),
                    seen_as.vdev().to_string(),
                )?;
                self.store.write(
                    &self.paths.indexed("state", node.n),
                    XenbusState::Initialised.number().to_string(),
                )?;
                Ok(())
            }
            Err(error) if error.is_temporary() => {
                debug!("domain {domain}: waiting: {}", chain(&error));
                self.waiting_for_device = true;
                Ok(())
            }
            Err(error) => self.fail_device(node, &bdf.to_string(), &chain(&error)),
        }
    }

    /// By its address on the host: indices shift, and the address in the guest may be another device's by now.
    fn take_away(&mut self, node: &DeviceNode) -> Result<(), SessionError> {
        if let Ok(bdf) = node.address
            && self.exports.remove(bdf)
        {
            info!("domain {}: {bdf} was taken away", self.setup.domain);
        }
        // Not to be done again, should the toolstack leave the node behind.
        self.store.write(
            &self.paths.indexed("state", node.n),
            XenbusState::Closed.number().to_string(),
        )?;
        Ok(())
    }

    /// The toolstack of an HVM guest waits for nobody: it may have removed a device's nodes before they were looked at.
    fn take_away_without_node(&mut self) -> Result<(), SessionError> {
        let paths = &self.paths;
        // As they are at one moment: while the toolstack renumbers, a device seems to have none.
        let nodes = self
            .store
            .transaction(|store| nodes::devices(store, paths))?;
        // Without any, the backend is about to go, or what is there cannot be read.
        if nodes.is_empty() {
            return Ok(());
        }
        for bdf in self.without_node(&nodes) {
            self.exports.remove(bdf);
            info!("domain {}: {bdf} was taken away", self.setup.domain);
        }
        Ok(())
    }

    fn without_node(&self, nodes: &[DeviceNode]) -> Vec<Bdf> {
        self.exports
            .iter()
            .map(|export| export.device.bdf)
            .filter(|bdf| !nodes.iter().any(|node| node.address == Ok(*bdf)))
            .collect()
    }

    /// Devices that were withdrawn are the guest's no more, and answer no more. Their nodes stay until the toolstack takes them away.
    pub(super) fn lose_withdrawn(&mut self) -> Result<(), SessionError> {
        let lost: Vec<_> = self.exports.withdrawn().collect();
        if lost.is_empty() {
            return Ok(());
        }
        for (bdf, why) in lost {
            self.exports.remove(bdf);
            let nodes = nodes::devices(&mut self.store, &self.paths)?;
            match nodes.iter().find(|node| node.address == Ok(bdf)) {
                Some(node) => self.fail_device(node, &bdf.to_string(), why)?,
                None => info!("domain {}: {bdf}: {why}", self.setup.domain),
            }
        }
        Ok(())
    }

    fn fail_device(
        &mut self,
        node: &DeviceNode,
        device: &str,
        why: &str,
    ) -> Result<(), SessionError> {
        let short = |text: &str| {
            printable(text)
                .chars()
                .take(LONGEST_REASON)
                .collect::<String>()
        };
        let (device, why) = (short(device), short(why));
        error!("domain {}: cannot have {device}: {why}", self.setup.domain);
        self.store
            .write(&self.paths.indexed("error", node.n), &why)?;
        self.store.write(
            &self.paths.indexed("state", node.n),
            XenbusState::Closed.number().to_string(),
        )?;
        self.store.write(
            &self.paths.error,
            format!("{} {device}: {why}", libc::EINVAL),
        )?;
        self.failed.push((device, why));
        Ok(())
    }
}
