//! Devices that come to the guest, and go.

use conf_space::address::Bdf;
use log::{debug, info, warn};
use xenbus::XenbusState;

use super::nodes::{self, DeviceNode};
use super::{Session, SessionError};
use crate::text::chain;

impl Session {
    /// After a restart: takes up the devices that the guest has, as their records say, and lets go of those that were taken from it
    /// meanwhile.
    pub(super) fn restore_exports(&mut self) -> Result<(), SessionError> {
        let domain = self.setup.domain;
        let nodes = nodes::devices(&mut self.store, &self.paths)?;
        self.restore_failures(&nodes)?;
        for device in self.setup.devices.list() {
            let bdf = device.bdf;
            if !device.is_held_by(domain) {
                continue;
            }
            match nodes.iter().find(|node| node.address == Ok(bdf)) {
                None => {
                    info!("domain {domain}: {bdf} was taken away");
                    self.setup.devices.release(&device);
                }
                Some(node) => {
                    if let Err(error) = self.exports.add(bdf, None) {
                        // It stays the guest's: taking it away would be worse.
                        self.fail_device(node, &chain(&error))?;
                    }
                }
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
                let why = format!(
                    "{text} is no PCI address: domain:bus:device.function, as in 0000:03:00.0"
                );
                return self.fail_device(node, &why);
            }
        };
        match self.exports.add(bdf, node.wished) {
            Ok(_) if self.exports.is_withheld(bdf) => {
                debug!("domain {domain}: waiting: {bdf} could still be taken away");
                self.waiting_for_device = true;
                Ok(())
            }
            Ok(seen_as) => {
                info!("domain {domain}: {bdf} is {seen_as} in the guest");
                let (vdev, state) = (
                    seen_as.vdev().to_string(),
                    XenbusState::Initialised.number().to_string(),
                );
                self.write_device(node, &[("vdev", &vdev), ("state", &state)])
            }
            Err(error) if error.is_temporary() => {
                debug!("domain {domain}: waiting: {}", chain(&error));
                self.waiting_for_device = true;
                Ok(())
            }
            Err(error) => self.fail_device(node, &chain(&error)),
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
        let state = XenbusState::Closed.number().to_string();
        self.write_device(node, &[("state", &state)])
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
                Some(node) => self.fail_device(node, why)?,
                None => info!("domain {}: {bdf}: {why}", self.setup.domain),
            }
        }
        Ok(())
    }

    pub(super) fn write_device(
        &mut self,
        node: &DeviceNode,
        values: &[(&str, &str)],
    ) -> Result<(), SessionError> {
        Ok(nodes::write_device(
            &mut self.store,
            &self.paths,
            node,
            values,
        )?)
    }

    /// The guest has not let devices go that were taken from it, and the toolstack waits no longer. It has revoked what it granted; what we
    /// gave, configuration space and message-signalled interrupts, ends here. Nobody else gets such a device yet: mappings of its memory
    /// that the guest has made outlive the permission, until the guest lets go of them, or ends.
    pub(super) fn revoke_unanswered(&mut self) -> Result<(), SessionError> {
        let (domain, guest) = (self.setup.domain, self.exports.guest());
        for node in nodes::devices(&mut self.store, &self.paths)? {
            if node.state == XenbusState::Closing
                && let Ok(bdf) = node.address
                && self.exports.revoke(bdf)
            {
                warn!(
                    "domain {domain} does not let {bdf} go, and cannot use it any more. It is free for others when the guest answers \
                     (xl unpause {guest}, if it is paused), or ends (xl destroy {guest})"
                );
            }
        }
        Ok(())
    }
}
