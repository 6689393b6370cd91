//! What a device has in common with others: its INTx line, and memory pages with their BARs. Pure.
//!
//! Xen gives guests memory by pages and interrupt lines as a whole. Who has a device can thus reach the registers of another one in the
//! same page (XSA-461), and who does not acknowledge a line's interrupt keeps the others on it waiting. Between devices of one owner that
//! is no matter.

use std::fmt;

use conf_space::Resource;
use conf_space::address::Bdf;
use xenbus::DomId;

/// Who has a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// dom0, with a driver or without.
    Dom0(Option<String>),
    /// A guest.
    Guest(DomId),
    /// It is hidden, and nobody's.
    Nobody,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dom0(Some(driver)) => write!(f, "dom0's {driver}"),
            Self::Dom0(None) => f.write_str("dom0"),
            Self::Guest(domain) => write!(f, "domain {domain}"),
            Self::Nobody => f.write_str("nobody"),
        }
    }
}

/// What a device occupies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occupancy {
    /// The device.
    pub bdf: Bdf,
    /// The driver bound in dom0.
    pub driver: Option<String>,
    /// Its interrupt as dom0 numbers it: the INTx line's, or the first message's if `uses_line` is not set; 0: none.
    pub irq: u32,
    /// That driver gets its interrupts by the INTx line, and not by MSI or MSI-X.
    pub uses_line: bool,
    /// BARs 0 to 5 and the expansion ROM.
    pub resources: [Resource; 7],
}

/// A device beside the one in question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// What it occupies. For a guest's device, `uses_line` says whether that guest may.
    pub occupies: Occupancy,
    /// Who has it.
    pub holder: Holder,
}

/// What a device shares with another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared<T> {
    /// What is shared.
    pub what: T,
    /// The other device.
    pub with: Bdf,
    /// Who has that one.
    pub holder: Holder,
}

impl<T> fmt::Display for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.with, self.holder)
    }
}

/// What there is to know of a hidden device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hidden {
    /// The guest that has it now.
    pub owner: Option<DomId>,
    /// That guest has no part in its INTx line.
    pub without_intx: bool,
}

/// The devices beside `of`, and who has them. `hidden` says which are hidden.
pub fn neighbours(
    survey: Vec<Occupancy>,
    of: Bdf,
    hidden: impl Fn(Bdf) -> Option<Hidden>,
) -> Vec<Neighbour> {
    survey
        .into_iter()
        .filter(|occupies| occupies.bdf != of)
        .map(|mut occupies| {
            let Some(hidden) = hidden(occupies.bdf) else {
                let holder = Holder::Dom0(occupies.driver.clone());
                return Neighbour { occupies, holder };
            };
            occupies.uses_line = !hidden.without_intx;
            Neighbour {
                occupies,
                holder: hidden.owner.map_or(Holder::Nobody, Holder::Guest),
            }
        })
        .collect()
}

/// Bytes of a page, the unit in which guests get memory.
const PAGE: u64 = 4096;

/// The neighbours that use the INTx line `irq` (0: none), but for those of `owner`.
pub fn on_line(irq: u32, owner: Option<DomId>, neighbours: &[Neighbour]) -> Vec<Shared<u32>> {
    others(owner, neighbours)
        .filter(|neighbour| irq != 0 && neighbour.occupies.uses_line)
        .filter(|neighbour| neighbour.occupies.irq == irq)
        .map(|neighbour| shared(irq, neighbour))
        .collect()
}

/// The neighbours with memory in a page in which one of `resources` is, but for those of `owner`. With the page's address.
pub fn in_pages(
    resources: &[Resource],
    owner: Option<DomId>,
    neighbours: &[Neighbour],
) -> Vec<Shared<u64>> {
    others(owner, neighbours)
        .filter_map(|neighbour| {
            let page = resources.iter().find_map(|ours| {
                let theirs = neighbour.occupies.resources.iter();
                theirs.filter_map(|theirs| common_page(ours, theirs)).min()
            })?;
            Some(shared(page, neighbour))
        })
        .collect()
}

fn others(owner: Option<DomId>, neighbours: &[Neighbour]) -> impl Iterator<Item = &Neighbour> {
    neighbours
        .iter()
        .filter(move |neighbour| match &neighbour.holder {
            Holder::Dom0(_) => true,
            Holder::Guest(domain) => Some(*domain) != owner,
            Holder::Nobody => false,
        })
}

fn shared<T>(what: T, neighbour: &Neighbour) -> Shared<T> {
    Shared {
        what,
        with: neighbour.occupies.bdf,
        holder: neighbour.holder.clone(),
    }
}

/// The first page that both have a part of.
fn common_page(one: &Resource, other: &Resource) -> Option<u64> {
    let pages = |resource: &Resource| -> Option<(u64, u64)> {
        let last = resource.start.checked_add(resource.size.checked_sub(1)?)?;
        resource
            .is_memory()
            .then_some((resource.start & !PAGE.wrapping_sub(1), last))
    };
    let ((one, one_last), (other, other_last)) = (pages(one)?, pages(other)?);
    let first = one.max(other);
    (first <= one_last.min(other_last)).then_some(first)
}

#[cfg(test)]
mod tests {
    use conf_space::ResourceFlags;

    use super::*;

    const US: Option<DomId> = Some(DomId(3));

    fn memory(start: u64, size: u64) -> Resource {
        Resource {
            start,
            size,
            flags: ResourceFlags::MEMORY,
        }
    }

    fn neighbour(holder: Holder, line: Option<u32>, resource: Resource) -> Neighbour {
        let mut resources = [Resource::ABSENT; 7];
        resources[2] = resource;
        Neighbour {
            occupies: Occupancy {
                bdf: "05:00.0".parse().unwrap(),
                driver: None,
                irq: line.unwrap_or(24),
                uses_line: line.is_some(),
                resources,
            },
            holder,
        }
    }

    fn dom0() -> Holder {
        Holder::Dom0(Some("ehci-pci".into()))
    }

    #[test]
    fn a_line_is_shared_with_whoever_else_uses_it() {
        let on = |irq, holder, line| {
            !on_line(irq, US, &[neighbour(holder, line, Resource::ABSENT)]).is_empty()
        };
        assert!(on(19, dom0(), Some(19)));
        assert!(on(19, Holder::Guest(DomId(4)), Some(19)));
        assert!(!on(19, dom0(), Some(18)));
        assert!(!on(19, dom0(), None));
        assert!(!on(19, Holder::Guest(DomId(3)), Some(19)));
        assert!(!on(19, Holder::Nobody, Some(19)));
        assert!(!on(0, dom0(), Some(0)));
    }

    #[test]
    fn a_page_is_shared_when_both_have_a_byte_in_it() {
        let page = |ours: Resource, theirs: Resource| {
            let neighbours = [neighbour(dom0(), None, theirs)];
            in_pages(&[Resource::ABSENT, ours], US, &neighbours)
                .first()
                .map(|shared| shared.what)
        };
        let small = memory(0xfebf_1000, 0x100);
        assert_eq!(page(small, memory(0xfebf_1f00, 0x100)), Some(0xfebf_1000));
        assert_eq!(page(small, memory(0xfebf_0800, 0x1000)), Some(0xfebf_1000));
        assert_eq!(page(small, memory(0xfebf_2000, 0x1000)), None);
        assert_eq!(page(small, memory(0xfebf_0000, 0x1000)), None);
        let ports = Resource {
            flags: ResourceFlags::IO,
            ..small
        };
        assert_eq!(page(small, ports), None);
        // What a broken bridge may claim.
        assert_eq!(page(small, memory(u64::MAX, 2)), None);
        assert_eq!(page(small, memory(0, u64::MAX)), Some(0xfebf_1000));
    }

    #[test]
    fn whose_the_other_is_decides() {
        let small = memory(0xfebf_1000, 0x100);
        let shares = |holder| !in_pages(&[small], US, &[neighbour(holder, None, small)]).is_empty();
        assert!(shares(dom0()));
        assert!(shares(Holder::Guest(DomId(4))));
        assert!(!shares(Holder::Guest(DomId(3))));
        assert!(!shares(Holder::Nobody));
        let found = in_pages(&[small], US, &[neighbour(dom0(), None, small)]);
        assert_eq!(found[0].to_string(), "0000:05:00.0 (dom0's ehci-pci)");
    }
}
