//! Lists of devices, checked before anything is asked.

use conf_space::bdf_list::EntryError;
use conf_space::selector::{self, Selector};

use crate::outcome::Outcome;

/// The entries of one or more lists of devices.
#[derive(Debug, Default)]
pub struct DeviceLists {
    understood: Vec<Selector>,
    /// Entries that name nothing. They void none of the others.
    pub refused: Vec<EntryError>,
}

impl DeviceLists {
    /// Checks the lists as they were typed.
    pub fn parse(lists: &[String]) -> Self {
        let mut checked = Self::default();
        for entry in lists.iter().flat_map(|list| selector::parse(list)) {
            match entry {
                Ok(selector) => checked.understood.push(selector),
                Err(error) => checked.refused.push(error),
            }
        }
        checked
    }

    /// The entries that can be understood. `None`: there are none, and so nothing to do.
    pub fn entries(&self) -> Option<&[Selector]> {
        Some(self.understood.as_slice()).filter(|entries| !entries.is_empty())
    }

    /// How a command ends that has done `done` of the entries that could be understood.
    pub fn outcome(&self, done: usize) -> Outcome {
        if self.refused.is_empty() && done == self.understood.len() {
            Outcome::Done
        } else {
            Outcome::Failed
        }
    }
}

/// A network card, for tests.
#[cfg(test)]
pub fn network_card(
    bdf: &str,
    state: &str,
    driver: Option<&str>,
) -> pcibackd::control::protocol::DeviceLine {
    pcibackd::control::protocol::DeviceLine {
        device: bdf.parse().unwrap(),
        vendor: 0x8086,
        id: 0x10d3,
        subsystem: (0x8086, 0xa01f),
        path: Some("0000:00:1c.0/00.0".into()),
        class: 0x02_00_00,
        state: state.to_owned(),
        activity: None,
        resets: 0,
        driver: driver.map(str::to_owned),
        domain: None,
        guest: None,
        seen_as: None,
        permissive: false,
        errors: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(lists: &[&str]) -> DeviceLists {
        let lists: Vec<String> = lists.iter().map(|list| (*list).to_owned()).collect();
        DeviceLists::parse(&lists)
    }

    #[test]
    fn each_argument_is_a_list_and_a_bad_entry_voids_no_other() {
        let checked = parse(&["03:00.0,0000:04:00.1", "nonsense", "5:0.0"]);
        let entries: Vec<String> = checked
            .entries()
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(entries, ["0000:03:00.0", "0000:04:00.1", "0000:05:00.0"]);
        assert_eq!(checked.refused.len(), 1);
        assert_eq!(checked.refused[0].entry, "nonsense");
    }

    #[test]
    fn what_the_daemon_is_told_means_to_it_what_it_means_here() {
        let checked = parse(&[
            "(0000:03:00.0)(04:00.*)",
            "0000:05:00.0-0000:06:1f.7 7:*.* 8:1.2-5",
            "8086:10d3, 8086:10d3:8086:a01f 00:1c.0/00.0",
        ]);
        assert_eq!(checked.understood.len(), 8);
        let told: Vec<String> = checked.understood.iter().map(Selector::to_string).collect();
        let again = DeviceLists::parse(&told);
        assert_eq!(again.understood, checked.understood);
        assert!(again.refused.is_empty());
    }

    #[test]
    fn without_any_entry_there_is_nothing_to_ask() {
        assert_eq!(parse(&["", "03:00", "x"]).entries(), None);
    }
}
