//! What a configuration file means.

use std::time::Duration;

use ::virtio::pci::{Layout, Mode, Shape};
use ::virtio::transport::mmio::Version;
use conf_space::overlay::Permissive;

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pcibackd.toml");
    fs::write(&path, text).unwrap();
    Config::load(Some(&path))
}

#[test]
fn an_empty_file_is_the_defaults() {
    assert_eq!("".parse::<Config>().unwrap(), Config::default());
}

#[test]
fn a_guest_may_have_a_topology_of_its_own() {
    let config =
        parse("topology = \"vpci\"\n[guest.\"database\"]\ntopology = \"passthrough\"\n").unwrap();
    assert_eq!(config.topology_of("database"), TopologyKind::Passthrough);
    assert_eq!(config.topology_of("web"), TopologyKind::Vpci);
}

#[test]
fn a_guest_may_have_virtio_devices() {
    let config = parse(
        "[[guest.web.virtio]]\ntype = \"rng\"\n\
         [[guest.web.virtio]]\ntype = \"rng\"\nslot = \"1d\"\nmode = \"legacy\"\nlegacy_in_memory = true\n\
         [[guest.web.virtio]]\ntype = \"rng\"\ntransport = \"mmio\"\n\
         [[guest.web.virtio]]\ntype = \"rng\"\ntransport = \"mmio\"\nslot = \"3\"\nversion = 1\n",
    );
    let devices = config.unwrap().guest["web"].virtio.clone();
    let seen: Vec<_> = devices.iter().map(|device| device.place).collect();
    let pci = |slot, mode, legacy_in_memory| Place::Pci {
        slot,
        shape: Shape {
            mode,
            layout: Layout::Qemu,
            legacy_in_memory,
        },
    };
    let mmio = |slot, version| Place::Mmio { slot, version };
    assert_eq!(
        seen,
        [
            pci(None, Mode::Transitional, false),
            pci(Slot::new(0x1d).ok(), Mode::Legacy, true),
            mmio(None, Version::Two),
            mmio(MmioSlot::new(3).ok(), Version::One),
        ]
    );
}

#[test]
fn what_is_not_understood_is_refused_with_its_place() {
    for (text, named) in [
        ("facde = \"off\"", "facde"),
        ("facade = \"of\"", "facade"),
        ("[guest.a]\ntopolgy = \"vpci\"", "topolgy"),
        ("[defaults]\npermisive = true", "permisive"),
        ("[[guest.a.virtio]]\ntype = \"gpu\"", "gpu"),
        ("[[guest.a.virtio]]\ntype = \"blk\"", "path"),
        (
            "[[guest.a.virtio]]\ntype = \"rng\"\nserial = \"1\"",
            "serial",
        ),
        ("[[guest.a.virtio]]\nslot = \"1f\"", "type"),
        (
            "[[guest.a.virtio]]\ntype = \"rng\"\nslot = \"1\"",
            "chipset's",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"rng\"\nmode = \"modern\"\nlegacy_in_memory = true",
            "legacy interface",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"blk\"\npath = \"disk.img\"",
            "whole path",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"blk\"\npath = \"/disk\"\nserial = \"123456789012345678901\"",
            "20 characters",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"blk\"\npath = \"/disk\"\nqueues = 0",
            "nonzero",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"blk\"\npath = \"/disk\"\ntap = \"web0\"",
            "tap",
        ),
        ("[[guest.a.virtio]]\ntype = \"net\"", "bridge"),
        (
            "[[guest.a.virtio]]\ntype = \"net\"\ntap = \"a\"\nbridge = \"b\"",
            "one of two keys",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"net\"\ntap = \"a b\"",
            "15 letters",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"net\"\ntap = \"a\"\nmac = \"01:00:00:00:00:00\"",
            "six bytes",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"console\"\nports = [{ name = \"a\" }, { name = \"a\" }]",
            "two ports",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"console\"\nports = [{ name = \"a/b\" }]",
            "63 letters",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"console\"\npath = \"/disk\"",
            "path",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"rng\"\nslot = \"20\"",
            "02 to 1f",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"rng\"\ntransport = \"mmio\"\nslot = \"1f\"",
            "0 to 6",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"rng\"\ntransport = \"mmio\"\nversion = 3",
            "version",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"rng\"\ntransport = \"mmio\"\nmode = \"legacy\"",
            "no key mode",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"rng\"\nversion = 2",
            "no key version",
        ),
        (
            "[[guest.a.virtio]]\ntype = \"rng\"\nmod = \"legacy\"",
            "mod",
        ),
        ("[defaults]\nid = \"8086:10d3\"", "id"),
        ("[defaults]\nreset = \"hard\"", "hard"),
        ("[defaults]\nhost = \"qemu\"", "vfio"),
        ("[defaults]\nintx = \"on\"", "off"),
        ("[defaults]\naer = { timeout = 0 }", "nonzero"),
        ("[commands]\nkill = []", "program"),
        ("[commands]\nkil = [\"xl\"]", "kil"),
        ("[[device]]\nreset = \"none\"", "bdf, id or path"),
        ("[[device]]\nbdf = \"03:00\"", "03:00"),
        ("[[device]]\nid = \"8086\"", "vendor:device"),
        ("[[device]]\npath = \"00:1c.0/\"", "device.function"),
        ("[[device]]\nid = \"8086:10d3\"\nquirk = []", "quirk"),
        (
            "[[device]]\nid = \"8086:10d3\"\nquirks = [\"c8:3:ff\"]",
            "1, 2 or 4",
        ),
        ("[defaults]\npermissive = \"yes\"", "true, false, or a list"),
        ("[defaults]\npermissive = [\"0x48..0x40\"]", "0x1000"),
        (
            "[defaults]\npermissive = [{ rnge = \"0x48..0x40\" }]",
            "rnge",
        ),
        (
            "[defaults]\npermissive = [{ range = \"0x48\" }]",
            "two offsets",
        ),
    ] {
        let error = crate::text::chain(&parse(text).unwrap_err());
        assert!(error.contains(named) && error.contains("line"), "{error}");
    }
}

#[test]
fn a_file_asked_for_by_name_must_be_there() {
    assert!(matches!(
        Config::load(Some(Path::new("/nonexistent/pcibackd.toml"))),
        Err(ConfigError::Read { .. })
    ));
}

fn nic() -> DeviceNames {
    DeviceNames {
        bdf: "0000:03:00.0".parse().unwrap(),
        vendor: 0x8086,
        device: 0x10d3,
        subsystem: (0x8086, 0xa01f),
        path: "0000:00:1c.0/00.0".parse().ok(),
    }
}

fn permissive(text: &str) -> Permissive {
    parse(text).unwrap().settings_for(&nic()).permissive
}

#[test]
fn what_is_not_said_of_a_device_comes_from_the_defaults_setting_by_setting() {
    let settings = parse(
        "[defaults]\nreset = \"pm\"\naer = { on_failure = \"kill\" }\n\
         [[device]]\nid = \"8086:10d3\"\naer = { timeout = 3 }\nallow_interrupt_control = true\n\
         allow_shared_interrupt = true\nallow_shared_pages = true\nhost = \"vfio\"\nintx = \"off\"\n\
         [[device]]\nid = \"8086:ffff\"\nreset = \"none\"\n",
    )
    .unwrap()
    .settings_for(&nic());
    let expected = DeviceSettings {
        reset: ResetChoice::Pm,
        allow_interrupt_control: InterruptControl::Yes,
        allow_shared_interrupt: true,
        allow_shared_pages: true,
        host: HostChoice::Vfio,
        intx: Intx::Off,
        aer: AerPolicy {
            mmio_enabled: false,
            on_failure: OnFailure::Kill,
            timeout: Duration::from_secs(3),
        },
        ..DeviceSettings::default()
    };
    assert_eq!(settings, expected);
}

#[test]
fn of_several_entries_for_a_device_the_later_one_has_the_last_word() {
    let text = "[[device]]\nbdf = \"03:00.0\"\npermissive = true\n\
                [[device]]\npath = \"00:1c.0/00.0\"\npermissive = false\n";
    assert_eq!(permissive(text), Permissive::No);
}

#[test]
fn an_entry_with_several_keys_is_for_the_device_that_all_of_them_name() {
    for (keys, all) in [
        ("bdf = \"03:00.0\"\nid = \"8086:10d3\"", true),
        (
            "bdf = \"03:00.0\"\nid = \"8086:10d3:8086:a01f\"\npath = \"00:1c.0/00.0\"",
            true,
        ),
        // Another card has come to the address, or into the slot.
        ("bdf = \"03:00.0\"\nid = \"8086:1533\"", false),
        (
            "path = \"00:1c.0/00.0\"\nid = \"8086:10d3:8086:0000\"",
            false,
        ),
        // The card has gone to another address.
        ("bdf = \"04:00.0\"\nid = \"8086:10d3\"", false),
    ] {
        let text = format!("[[device]]\n{keys}\npermissive = true\n");
        let config = parse(&text).unwrap();
        assert_eq!(
            config.settings_for(&nic()).permissive == Permissive::Yes,
            all,
            "{keys}"
        );
        let here = !keys.contains("04:00.0");
        assert_eq!(
            config.devices[0].keys.disagree_on(&nic()),
            !all && here,
            "{keys}"
        );
    }
}

#[test]
fn ranges_come_with_or_without_a_reason_and_join() {
    let ranges = permissive(
        "[[device]]\nid = \"8086:10d3\"\npermissive = [\n  { range = \"0x40..0x44\", reason = \"payload size\" },\n  \"0x44..0x48\",\n]\n",
    );
    let Permissive::Ranges(ranges) = ranges else {
        panic!("{ranges:?}")
    };
    let shown: Vec<String> = ranges.iter().map(|range| range.to_string()).collect();
    assert_eq!(shown, ["0x40..0x48"]);
    assert_eq!(permissive("[defaults]\npermissive = []\n"), Permissive::No);
}

#[test]
fn an_entry_knows_its_line() {
    let config = parse("\n[[device]]\nid = \"8086:10d3\"\n\n# another\n[[device]]\nbdf = \"03:00.0\"\npath = \"00:1c.0/0.0\"\n").unwrap();
    let found: Vec<(usize, String)> = config
        .devices
        .iter()
        .map(|entry| (entry.line, entry.keys.to_string()))
        .collect();
    let expected = [
        (2, "id = \"8086:10d3\""),
        (6, "bdf = \"0000:03:00.0\", path = \"0000:00:1c.0/00.0\""),
    ]
    .map(|(line, keys)| (line, keys.to_owned()));
    assert_eq!(found, expected);
}

#[test]
fn a_bad_line_in_the_file_of_quirks_is_told_of_and_the_others_hold() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("quirks");
    fs::write(
        &path,
        "03:00.0-c8:2:ff # payload\n03:00.0-c8:5:ff\n04:00.0-d0:1:1\n",
    )
    .unwrap();
    let text =
        format!("quirks = {path:?}\n[[device]]\nid = \"8086:10d3\"\nquirks = [\"d0:4:f0\"]\n");
    let config = parse(&text).unwrap();
    assert_eq!(config.warnings.len(), 1);
    assert!(
        config.warnings[0].contains("line 2"),
        "{:?}",
        config.warnings
    );
    let quirks: Vec<String> = config
        .settings_for(&nic())
        .quirks
        .iter()
        .map(|quirk| quirk.to_string())
        .collect();
    assert_eq!(quirks, ["000000d0:4:000000f0", "000000c8:2:000000ff"]);
}

#[test]
fn commands_are_run_with_what_the_placeholders_stand_for() {
    let commands = parse("[commands]\nkill = [\"/bin/kill it\", \"{domain}/{device}\"]\n")
        .unwrap()
        .commands;
    let fill = |command: &[String]| Commands::fill(command, xenbus::DomId(7), nic().bdf);
    assert_eq!(fill(&commands.kill), ["/bin/kill it", "7/0000:03:00.0"]);
    assert_eq!(
        fill(&commands.detach),
        ["xl", "pci-detach", "7", "0000:03:00.0"]
    );
}

/// What stands commented out in the file that is installed is an example that must be understood.
#[test]
fn the_example_that_is_installed_is_understood() {
    let text = include_str!("../../packaging/pcibackd.toml");
    let examples: String = text
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(example) if !example.starts_with(' ') => format!("{example}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let without_file = examples.replace("quirks = \"/etc/pciback/quirks\"", "");
    assert_ne!(without_file, examples);
    let config: Config = without_file.parse().unwrap();
    assert!(!config.devices.is_empty() && !config.hide.is_empty());
    assert_eq!(config.commands, Commands::default());
    // Its [defaults] are those that hold without it.
    let mut other = nic();
    other.bdf = "0000:7f:00.0".parse().unwrap();
    (other.device, other.path) = (0, None);
    assert_eq!(config.settings_for(&other), DeviceSettings::default());
}
