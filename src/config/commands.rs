//! `[commands]`: what the daemon runs when it has to act on a guest.

use serde::Deserialize;
use serde::de::{Deserializer, Error};
use xenbus::DomId;

use conf_space::address::Bdf;

/// Programs with their arguments, run as they are, without a shell. `{domain}` stands for the domain's number, `{device}` for the
/// device's address.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Commands {
    /// Takes a device from a guest.
    #[serde(deserialize_with = "command")]
    pub detach: Vec<String>,
    /// Destroys a guest.
    #[serde(deserialize_with = "command")]
    pub kill: Vec<String>,
}

impl Default for Commands {
    fn default() -> Self {
        let command = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Self {
            detach: command(&["xl", "pci-detach", "{domain}", "{device}"]),
            kill: command(&["xl", "destroy", "{domain}"]),
        }
    }
}

impl Commands {
    /// A command with what the placeholders stand for: the program and its arguments.
    pub fn fill(command: &[String], domain: DomId, device: Bdf) -> Vec<String> {
        let (domain, device) = (domain.to_string(), device.to_string());
        let fill = |word: &String| {
            word.replace("{domain}", &domain)
                .replace("{device}", &device)
        };
        command.iter().map(fill).collect()
    }
}

fn command<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let words = Vec::<String>::deserialize(deserializer)?;
    if words.first().is_none_or(String::is_empty) {
        return Err(Error::custom(
            "a command begins with a program, as in [\"xl\", \"destroy\", \"{domain}\"]",
        ));
    }
    Ok(words)
}
