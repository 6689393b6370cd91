//! A virtio device as it is typed. What makes sense is for the daemon's own types to say, which read it as the configuration file is read.

use std::path::PathBuf;

use clap::Args;
use pcibackd::config::VirtioDevice;
use serde::Serialize;
use serde_json::{Map, Value};

/// A device, an option for each of its keys.
#[derive(Debug, Args, Serialize)]
pub struct DeviceOptions {
    /// What it is: rng, blk, net or console
    #[arg(long = "type", value_name = "TYPE")]
    #[serde(rename = "type")]
    kind: String,
    /// How the guest reaches it: pci or mmio
    #[arg(long, value_name = "TRANSPORT", default_value = "pci")]
    transport: String,
    /// pci: where it is on the guest's first bus, 02 to 1f [default: the highest that is free]; mmio: 0 to 6
    #[arg(long, value_name = "SLOT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<String>,
    /// transitional, modern or legacy [default: transitional]
    #[arg(long, value_name = "MODE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
    /// mmio: 1, which is the legacy one, or 2 [default: 2]
    #[arg(long, value_name = "VERSION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u8>,
    /// Where its registers are: qemu or compact [default: qemu]
    #[arg(long, value_name = "LAYOUT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    layout: Option<String>,
    /// blk: its image, a file or a block device
    #[arg(long, value_name = "FILE", value_parser = absolute)]
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
    /// blk: the guest cannot write
    #[arg(long)]
    #[serde(skip_serializing_if = "is_not_set")]
    read_only: bool,
    /// blk: past the host's cache
    #[arg(long)]
    #[serde(skip_serializing_if = "is_not_set")]
    direct: bool,
    /// blk: its serial number, up to 20 characters
    #[arg(long, value_name = "TEXT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    /// net: the bridge that it is in
    #[arg(long, value_name = "BRIDGE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    bridge: Option<String>,
    /// net: a tap that you have made for it
    #[arg(long, value_name = "TAP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    tap: Option<String>,
    /// net: its address [default: always the same for this guest and slot]
    #[arg(long, value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    /// blk: how many queues; net: how many pairs [default: 1]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    queues: Option<u8>,
    /// console: a socket for it [default: a pseudo-terminal]
    #[arg(long, value_name = "PATH", value_parser = absolute)]
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<PathBuf>,
}

fn is_not_set(flag: &bool) -> bool {
    !flag
}

fn absolute(path: &str) -> std::io::Result<PathBuf> {
    std::path::absolute(path)
}

impl DeviceOptions {
    /// The device.
    ///
    /// # Errors
    /// What does not make sense of it.
    pub fn device(&self) -> Result<VirtioDevice, String> {
        let keys = serde_json::to_value(self).map_err(|error| error.to_string())?;
        serde_json::from_value(keys).map_err(|error| error.to_string())
    }
}

/// A device from `KEY=VALUE,KEY=VALUE`: the keys are those of the configuration file, and one without a value is true.
///
/// # Errors
/// What does not make sense of it.
pub fn parse(text: &str) -> Result<VirtioDevice, String> {
    let mut keys = Map::new();
    for word in text.split(',') {
        let (key, value) = word.split_once('=').unwrap_or((word, "true"));
        let value = match (key, value) {
            (_, "true") => Value::Bool(true),
            (_, "false") => Value::Bool(false),
            ("queues" | "version", number) => {
                let number = number.parse::<u8>();
                number
                    .map_err(|_| format!("{word}: a number from 1 to 255"))?
                    .into()
            }
            ("path" | "socket", path) => {
                let path = absolute(path).map_err(|error| format!("{word}: {error}"))?;
                Value::String(path.to_string_lossy().into_owned())
            }
            (_, text) => text.into(),
        };
        if keys.insert(key.to_owned(), value).is_some() {
            return Err(format!("{key} is there twice"));
        }
    }
    serde_json::from_value(keys.into()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use pcibackd::config::{Config, Model};

    use super::*;

    #[test]
    fn keys_and_values_mean_what_they_mean_in_the_configuration_file() {
        let typed = parse("type=blk,path=/disk,read_only,queues=2,serial=7,slot=1e,mode=modern");
        let config: Config = "[[guest.a.virtio]]\ntype = \"blk\"\npath = \"/disk\"\nread_only = true\nqueues = 2\nserial = \"7\"\n\
                              slot = \"1e\"\nmode = \"modern\""
            .parse()
            .unwrap();
        assert_eq!(typed.as_ref(), Ok(&config.guest["a"].virtio[0]));
        let Ok(Model::Blk(disk)) = parse("type=blk,path=disk").map(|device| device.model) else {
            panic!("no disk");
        };
        assert!(disk.path.is_absolute());
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_reason() {
        for (text, reason) in [
            ("path=/disk", "type"),
            ("type=floppy", "floppy"),
            ("type=blk", "path"),
            ("type=rng,path=/disk", "path"),
            ("type=blk,path=/disk,queues=many", "255"),
            ("type=rng,slot=1", "chipset"),
            ("type=rng,type=rng", "twice"),
            ("type=net,tap=a,bridge=b", "one of two keys"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
