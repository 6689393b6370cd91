//! What there is to see of a device while it works, for whoever wants to know what its driver is at.

use vm_memory::{Bytes, GuestAddress};

use crate::device::DeviceKind;
use crate::features::Features;
use crate::memory::View;
use crate::queue::QueueConfig;
use crate::status::{Interface, Status};
use crate::{blk, console, net};

/// A device as its driver has it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceView {
    /// Its type.
    pub kind: DeviceKind,
    /// The status register.
    pub status: Status,
    /// Which interface the driver uses, once it uses one.
    pub interface: Interface,
    /// What is offered.
    pub offered: Features,
    /// What of it the driver has chosen so far.
    pub chosen: Features,
    /// Interrupts are messages.
    pub msix: bool,
    /// By number.
    pub queues: Vec<QueueView>,
}

/// A queue as its driver has set it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueView {
    /// Descriptors.
    pub size: u16,
    /// The most that are offered.
    pub max_size: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Guest address of the descriptor table, or of the packed ring.
    pub descriptors: u64,
    /// Guest address of the available ring, or of the driver's event suppression structure.
    pub driver: u64,
    /// Guest address of the used ring, or of the device's event suppression structure.
    pub device: u64,
    /// Where the driver puts the next buffer, and where the device gives the next one back: the indices in a split ring's memory.
    pub indices: Option<(u16, u16)>,
    /// Chains that the device has taken and not given back.
    pub in_flight: usize,
    /// The vector of MSI-X, if there is one.
    pub vector: Option<u16>,
}

/// The indices of a split ring (virtio 1.3, sections 2.7.6 and 2.7.8): 2 bytes behind the flags.
pub(crate) fn indices(view: &View, queue: &QueueConfig) -> Option<(u16, u16)> {
    let index = |ring: u64| {
        let bytes: [u8; 2] = view.read_obj(GuestAddress(ring.checked_add(2)?)).ok()?;
        Some(u16::from_le_bytes(bytes))
    };
    Some((index(queue.driver)?, index(queue.device)?))
}

const NET: [(Features, &str); 15] = [
    (net::feature::CSUM, "CSUM"),
    (net::feature::GUEST_CSUM, "GUEST_CSUM"),
    (net::feature::MAC, "MAC"),
    (net::feature::GUEST_TSO4, "GUEST_TSO4"),
    (net::feature::GUEST_TSO6, "GUEST_TSO6"),
    (net::feature::GUEST_ECN, "GUEST_ECN"),
    (net::feature::HOST_TSO4, "HOST_TSO4"),
    (net::feature::HOST_TSO6, "HOST_TSO6"),
    (net::feature::HOST_ECN, "HOST_ECN"),
    (net::feature::MRG_RXBUF, "MRG_RXBUF"),
    (net::feature::STATUS, "STATUS"),
    (net::feature::CTRL_VQ, "CTRL_VQ"),
    (net::feature::CTRL_RX, "CTRL_RX"),
    (net::feature::MQ, "MQ"),
    (net::feature::CTRL_MAC_ADDR, "CTRL_MAC_ADDR"),
];

const BLOCK: [(Features, &str); 9] = [
    (blk::feature::SEG_MAX, "SEG_MAX"),
    (blk::feature::RO, "RO"),
    (blk::feature::BLK_SIZE, "BLK_SIZE"),
    (blk::feature::FLUSH, "FLUSH"),
    (blk::feature::TOPOLOGY, "TOPOLOGY"),
    (blk::feature::CONFIG_WCE, "CONFIG_WCE"),
    (blk::feature::MQ, "MQ"),
    (blk::feature::DISCARD, "DISCARD"),
    (blk::feature::WRITE_ZEROES, "WRITE_ZEROES"),
];

const CONSOLE: [(Features, &str); 1] = [(console::feature::MULTIPORT, "MULTIPORT")];

/// The names of feature bits as the specification has them, without their prefixes; a bit without a name by its number.
pub fn feature_names(kind: DeviceKind, features: Features) -> Vec<String> {
    let of_kind: &[(Features, &str)] = match kind {
        DeviceKind::Net => &NET,
        DeviceKind::Block => &BLOCK,
        DeviceKind::Console => &CONSOLE,
        DeviceKind::Entropy => &[],
    };
    let bits = (0..u64::BITS).map(|bit| (bit, Features::from_bits_retain(1 << bit)));
    bits.filter(|(_, feature)| features.contains(*feature))
        .map(|(bit, feature)| {
            let special = of_kind.iter().find(|(named, _)| *named == feature);
            let name = special.map(|(_, name)| *name);
            let common = || feature.iter_names().map(|(name, _)| name).next();
            name.or_else(common)
                .map_or_else(|| format!("bit {bit}"), str::to_owned)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_the_names_of_their_device_type() {
        let features =
            Features::VERSION_1 | net::feature::CSUM | Features::from_bits_retain(1 << 3);
        assert_eq!(
            feature_names(DeviceKind::Net, features),
            ["CSUM", "bit 3", "VERSION_1"]
        );
        assert_eq!(feature_names(DeviceKind::Block, blk::feature::RO), ["RO"]);
    }
}
