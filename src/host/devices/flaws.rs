//! What is broken in a device's configuration space, though the device is used.

use conf_space::capabilities::Capabilities;
use conf_space::registers::header;
use conf_space::{ConfigSize, ConfigSpace, Width};
use msi::Interrupts;

use crate::text::chain;

const REMEDY: &str = "look whether the maker of the device has newer firmware for it";
/// Flaws of the capability lists that are told: a broken list may have hundreds.
const MOST: usize = 4;

/// Each flaw in words: what follows from it, and what can be done. None of a device that does not answer.
pub(super) fn find<C: ConfigSpace + ?Sized>(
    config: &C,
    size: ConfigSize,
    interrupts: &Interrupts,
) -> Vec<String> {
    if matches!(
        config.read(header::COMMAND.offset, Width::Four),
        Ok(u32::MAX) | Err(_)
    ) {
        return Vec::new();
    }
    let lists = Capabilities::walk(config, size).unwrap_or_default();
    let mut found: Vec<String> = lists
        .faults
        .iter()
        .take(MOST)
        .map(|fault| {
            format!("{fault}. Guests do without the capabilities that are not found: {REMEDY}")
        })
        .collect();
    if let Some(Err(broken)) = interrupts.msix() {
        found.push(format!(
            "guests have MSI or INTx only, as its MSI-X is broken: {}; {REMEDY}",
            chain(&broken)
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use conf_space::memory::MemorySpace;

    use super::*;

    fn flaws(space: &MemorySpace) -> Vec<String> {
        let interrupts = Interrupts::discover(space, &[]).unwrap();
        find(space, ConfigSize::Conventional, &interrupts)
    }

    #[test]
    fn what_is_broken_is_told_with_what_follows_and_what_can_be_done() {
        let space = MemorySpace::new(ConfigSize::Conventional);
        assert_eq!(flaws(&space), [""; 0]);
        // MSI-X with its table in a BAR that is not there, after which the list leads back.
        space.set(0x06, Width::Two, 0x10);
        space.set(0x34, Width::One, 0x40);
        space.set(0x40, Width::Two, 0x4011);
        let found = flaws(&space);
        let [list, msix] = found.as_slice() else {
            panic!("{found:?}")
        };
        assert!(list.contains("loops back to 0x040"), "{list}");
        assert!(list.contains("without the capabilities"), "{list}");
        assert!(msix.contains("MSI or INTx"), "{msix}");
        assert!(found.iter().all(|flaw| flaw.ends_with(REMEDY)), "{found:?}");
        // It is dead, and not badly made.
        for offset in (0..256).step_by(4) {
            space.set(offset, Width::Four, u32::MAX);
        }
        assert_eq!(flaws(&space), [""; 0]);
    }
}
