//! What can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use pcibackd::daemon::DEFAULT_RUN_DIR;

use crate::commands::{
    acpi, create, doctor, exec, facade, hide, list, metrics, persist, reset, set, shell, show,
    status, trace, vf, virtio,
};
use crate::demo::Demo;

/// Hides PCI devices from dom0, so that Xen's guests can have them, and shows who has which
#[derive(Debug, Parser)]
#[command(name = "pciback", version, after_help = EXIT_CODES, subcommand_required = true)]
pub struct Arguments {
    /// Where the daemon keeps its control socket
    #[arg(long, value_name = "DIR", global = true, default_value = DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 all done, 1 some or all of it failed, 2 the command line makes no sense.";

/// How devices are written, for the commands that take lists of them.
pub const DEVICE_LISTS: &str = "\
Devices are written as lspci does: 0000:03:00.0 or 03:00.0. An argument may be a whole list, with wildcards
and ranges; the syntax of the kernel's xen-pciback.hide, '(0000:03:00.0)(04:00.*)', is understood too.
Instead of an address, which changes when a card is added, the slot may be named, 0000:00:1c.0/00.0, or the
kind of device, 8086:10d3 or 8086:10d3:8086:a01f, with its subsystem; 'pciback show' tells both.
Each entry is carried out and reported on its own: one that fails does not void the others.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Take devices from dom0's drivers, so that guests can have them
    Hide(hide::Hide),
    /// Give hidden devices back to dom0 and its drivers
    Unhide(hide::Unhide),
    /// Reset hidden devices that no guest has, or bring one back that was found dead
    Reset(reset::Reset),
    /// List the host's devices: where they are, who has them
    List(list::List),
    /// Show a device's configuration space as a guest sees it, register by register
    Show(show::Show),
    /// Set what a device's guest may do, until it gives the device back; or show what holds, and why
    Set(set::Set),
    /// List, make and take away virtual functions (SR-IOV)
    Vf(vf::Vf),
    /// Show the daemon and the guests that it serves
    Status(status::Status),
    /// Show what guests read and write, as it happens
    Trace(trace::Trace),
    /// Print the metrics that Prometheus is to have
    Metrics(metrics::Metrics),
    /// Bring what hides devices at boot up to the configuration, after it was edited
    Persist(persist::Persist),
    /// Say what is wrong with the host or a device, and what to do about it
    Doctor(doctor::Doctor),
    /// List, show and add virtio devices of HVM guests
    Virtio(virtio::Virtio),
    /// Make a guest by xl, and start it when its virtio devices are there
    Create(create::Create),
    /// Write the ACPI table by which an HVM guest finds its virtio-mmio devices
    Acpi(acpi::Acpi),
    /// Run a command that finds the hidden devices in /sys/bus/pci/drivers/pciback
    Exec(exec::Exec),
    /// Lay the facade for a daemon that runs in a sandbox; pcibackd-facade.service does that
    #[command(hide = true)]
    Facade(facade::Facade),
    /// See it all work without Xen, root or devices: on a machine embedded in this command
    Demo(Demo),
    /// Print a completion script for a shell
    Completions(shell::Completions),
    /// Print the manual page, or write all of them into a directory
    #[command(hide = true)]
    Man(shell::Man),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples() {
        let command = Arguments::command();
        for command in command.get_subcommands().filter(|one| !one.is_hide_set()) {
            let name = command.get_name();
            let (short, long) = (command.get_after_help(), command.get_after_long_help());
            let help = short.or(long).map(ToString::to_string).unwrap_or_default();
            assert!(
                help.contains(&format!("Examples:\n  pciback {name}")),
                "{name}: {help}"
            );
        }
    }

    #[test]
    fn the_run_directory_may_stand_before_and_after_the_command() {
        for arguments in [
            ["pciback", "--run-dir", "/x", "list"],
            ["pciback", "list", "--run-dir", "/x"],
        ] {
            let parsed = Arguments::try_parse_from(arguments).unwrap();
            assert_eq!(parsed.run_dir, PathBuf::from("/x"));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_code_2() {
        for arguments in [
            &["pciback"][..],
            &["pciback", "hide"],
            &["pciback", "show", "03:00"],
            &["pciback", "show", "03:00.0", "04:00.0"],
            &["pciback", "exec"],
            // Without --persist, nothing is changed for the next boot; and what runs is not the system below --root.
            &["pciback", "hide", "--no-initramfs", "03:00.0"],
            &["pciback", "unhide", "--root", "/mnt", "03:00.0"],
            &["pciback", "hide", "--persist", "--root", "/mnt", "03:00.0"],
            &["pciback", "acpi"],
            &["pciback", "acpi", "../web"],
            &["pciback", "virtio"],
            &["pciback", "virtio", "show"],
            &["pciback", "virtio", "add", "web"],
            &["pciback", "create"],
            &["pciback", "create", "web.cfg", "--virtio", "type=floppy"],
            &["pciback", "vf"],
            &["pciback", "vf", "create", "0", "03:00.0"],
            &["pciback", "vf", "create", "03:00.0"],
            &["pciback", "vf", "destroy"],
            &["pciback", "completions", "csh"],
        ] {
            let error = Arguments::try_parse_from(arguments).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
        }
    }

    #[test]
    fn what_follows_a_command_for_exec_is_its_own() {
        let parsed =
            Arguments::try_parse_from(["pciback", "exec", "--", "xl", "create", "-c", "--run-dir"]);
        let Command::Exec(arguments) = parsed.unwrap().command else {
            panic!("not exec")
        };
        assert_eq!(arguments.command, ["xl", "create", "-c", "--run-dir"]);
    }
}
