//! sysfs's `resource` file: one line per BAR and one for the ROM, `start end flags` in hexadecimal (Linux `include/linux/ioport.h`).

use conf_space::{Resource, ResourceFlags};

const RESOURCES: usize = 7;
const IORESOURCE_IO: u64 = 0x100;
const IORESOURCE_MEM: u64 = 0x200;
const IORESOURCE_PREFETCH: u64 = 0x2000;
const IORESOURCE_MEM_64: u64 = 0x10_0000;
const IORESOURCE_DISABLED: u64 = 0x1000_0000;
const IORESOURCE_UNSET: u64 = 0x2000_0000;

/// Reads BARs 0 to 5 and the ROM. A resource that is unset or disabled is absent.
pub(super) fn parse(text: &str) -> Result<[Resource; RESOURCES], String> {
    let mut found = [Resource::ABSENT; RESOURCES];
    for (slot, line) in found.iter_mut().zip(text.lines()) {
        *slot = parse_line(line).ok_or_else(|| {
            format!("the kernel's resource line '{line}' is not 'start end flags'")
        })?;
    }
    Ok(found)
}

fn parse_line(line: &str) -> Option<Resource> {
    let mut numbers = line
        .split_whitespace()
        .map(|word| u64::from_str_radix(word.strip_prefix("0x").unwrap_or(word), 16).ok());
    let (start, end, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
    if numbers.next().is_some() {
        return None;
    }
    let kind = if flags & IORESOURCE_IO != 0 {
        ResourceFlags::IO
    } else if flags & IORESOURCE_MEM != 0 {
        let mut kind = ResourceFlags::MEMORY;
        kind.set(ResourceFlags::MEMORY_64, flags & IORESOURCE_MEM_64 != 0);
        kind.set(
            ResourceFlags::PREFETCHABLE,
            flags & IORESOURCE_PREFETCH != 0,
        );
        kind
    } else {
        return Some(Resource::ABSENT);
    };
    if start == 0 || flags & (IORESOURCE_DISABLED | IORESOURCE_UNSET) != 0 {
        return Some(Resource::ABSENT);
    }
    let size = end.checked_sub(start)?.checked_add(1)?;
    Some(Resource {
        start,
        size,
        flags: kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_and_rom_are_read_with_their_kinds() {
        let text = "0x00000000febc0000 0x00000000febdffff 0x0000000000040200\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x000000000000c060 0x000000000000c07f 0x0000000000040101\n\
                    0x000000e000000000 0x000000e000003fff 0x000000000014220c\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x00000000feb80000 0x00000000febbffff 0x0000000000046200\n";
        let found = parse(text).unwrap();
        let memory = ResourceFlags::MEMORY;
        assert_eq!(
            found[0],
            Resource {
                start: 0xfebc_0000,
                size: 0x2_0000,
                flags: memory
            }
        );
        assert_eq!(found[1], Resource::ABSENT);
        assert_eq!(
            found[2],
            Resource {
                start: 0xc060,
                size: 0x20,
                flags: ResourceFlags::IO
            }
        );
        let wide = memory | ResourceFlags::MEMORY_64 | ResourceFlags::PREFETCHABLE;
        assert_eq!(
            found[3],
            Resource {
                start: 0xe0_0000_0000,
                size: 0x4000,
                flags: wide
            }
        );
        assert_eq!(found[6].size, 0x4_0000);
    }

    #[test]
    fn what_the_kernel_left_unset_is_no_resource() {
        let text = "0x0000000000000000 0x0000000000000fff 0x0000000020040200\n0x00000000fe000000 0x00000000fe000fff 0x0000000010040200\n";
        assert_eq!(parse(text).unwrap(), [Resource::ABSENT; RESOURCES]);
    }

    #[test]
    fn a_line_of_another_shape_is_an_error_that_shows_it() {
        for line in [
            "0x1 0x2",
            "0x1 0x2 0x200 0x4",
            "one two three",
            "0x2000 0x1000 0x200",
        ] {
            assert!(parse(line).unwrap_err().contains(line));
        }
    }
}
