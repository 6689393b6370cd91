//! Names of vendors and devices, from the system's own copy of the PCI ID database (pci-ids.ucw.cz).

use std::collections::BTreeMap;
use std::fs;

/// Where distributions put it: Debian and its kin, the Red Hat family and others.
const FILES: [&str; 2] = ["/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids"];

/// A device's vendor ID and device ID.
pub type Ids = (u16, u16);

/// The names of these devices, as far as the system knows them.
pub fn of(wanted: impl IntoIterator<Item = Ids>) -> BTreeMap<Ids, String> {
    let found = FILES.iter().find_map(|file| fs::read(file).ok());
    let database = found.unwrap_or_default();
    find(&String::from_utf8_lossy(&database), wanted)
}

/// A line is a vendor `vvvv  Name`, a device of the vendor above it, after a tab, `dddd  Name`, or a subsystem, after two. Classes come last,
/// each with a `C` and a blank before it.
fn find(database: &str, wanted: impl IntoIterator<Item = Ids>) -> BTreeMap<Ids, String> {
    // Of which the vendor alone may be known.
    let mut names: BTreeMap<Ids, Option<String>> =
        wanted.into_iter().map(|ids| (ids, None)).collect();
    let mut vendor = None;
    for line in database.lines() {
        if line.starts_with("C ") {
            break;
        }
        if let Some(entry) = line.strip_prefix('\t') {
            let Some((vendor, vendor_name)) = vendor else {
                continue;
            };
            if let Some((device, name)) = entry_of(entry)
                && let Some(found) = names.get_mut(&(vendor, device))
            {
                *found = Some(format!("{vendor_name} {name}"));
            }
            continue;
        }
        vendor = entry_of(line);
        if let Some((vendor, name)) = vendor {
            for ((_, device), found) in names.range_mut((vendor, 0)..=(vendor, u16::MAX)) {
                *found = Some(format!("{name} device {device:04x}"));
            }
        }
    }
    let known = names.into_iter();
    known.filter_map(|(ids, name)| Some((ids, name?))).collect()
}

fn entry_of(line: &str) -> Option<(u16, &str)> {
    let (id, name) = line.split_once("  ")?;
    // A subsystem's has a tab before it, a comment's has a mark.
    let id = Some(id).filter(|id| id.len() == 4)?;
    Some((u16::from_str_radix(id, 16).ok()?, name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATABASE: &str = "\
# A comment  with two blanks

10ec  Realtek Semiconductor Co., Ltd.
\t8139  RTL-8100/8101L/8139 PCI Fast Ethernet Adapter
\t\t0357 000a  TTP-Monitoring Card V2.0
8086  Intel Corporation
\t10d3  82574L Gigabit Network Connection
\t\t8086 a01f  Gigabit CT Desktop Adapter
\tzzzz  no number
C 02  Network controller
\t10d4  not a device
";

    fn names(ids: &[Ids]) -> Vec<(Ids, String)> {
        find(DATABASE, ids.iter().copied()).into_iter().collect()
    }

    #[test]
    fn a_device_has_its_vendors_and_its_own_name() {
        let intel = (0x8086, 0x10d3);
        let name = "Intel Corporation 82574L Gigabit Network Connection";
        assert_eq!(names(&[intel]), [(intel, name.to_owned())]);
    }

    #[test]
    fn of_an_unknown_device_the_vendor_is_named_and_an_unknown_vendor_is_not() {
        // The second's number is a class's line, the third's a subsystem's.
        let unknown = [(0x10ec, 0x1234), (0x8086, 0x10d4), (0x0357, 0x000a)];
        assert_eq!(
            names(&unknown),
            [
                (
                    unknown[0],
                    "Realtek Semiconductor Co., Ltd. device 1234".to_owned()
                ),
                (unknown[1], "Intel Corporation device 10d4".to_owned()),
            ]
        );
    }

    #[test]
    fn a_database_of_anything_else_names_nothing() {
        for database in [
            "",
            "\t8139  x\n",
            "\0\0\n\t\n\t\t\n  \n8086",
            "8086 Intel\n\t10d3  x\n",
        ] {
            assert!(find(database, [(0x8086, 0x10d3)]).is_empty());
        }
    }
}
