//! Whether the kernel's own backend, the module `xen-pciback`, is there or can come up (modprobe.d(5), `modules.builtin`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The module's name, with the underscores that the kernel makes of dashes.
const NAME: &str = "xen_pciback";

/// Where modprobe looks for configuration. Of two files of one name, the one in the earlier directory holds.
const DIRECTORIES: [&str; 5] = [
    "etc/modprobe.d",
    "run/modprobe.d",
    "usr/local/lib/modprobe.d",
    "usr/lib/modprobe.d",
    "lib/modprobe.d",
];

/// How near the kernel's backend is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelBackend {
    /// It serves guests.
    Registered {
        /// It is part of the kernel itself.
        built_in: bool,
    },
    /// udev loads it at the first guest with a PCI device.
    LoadedByAlias,
    /// Nobody loads it by alias, but `modprobe xen-pciback` does, as Xen's init scripts run it.
    LoadedByName,
    /// It is there, and is kept from being loaded.
    KeptAway,
    /// This kernel has none, or it was kept from starting.
    Absent,
}

impl KernelBackend {
    /// Looks for it. `root` is the directory that `sys`, `proc`, `etc` and `lib` are in.
    pub fn find(root: &Path) -> Self {
        let modules = kernel_release(root)
            .map(|release| root.join("lib/modules").join(release))
            .unwrap_or_default();
        let lists = |file: &str| {
            fs::read_to_string(modules.join(file))
                .is_ok_and(|text| text.lines().any(|line| is_backend(module_of(line))))
        };
        let built_in = lists("modules.builtin");
        if root
            .join("sys/bus/xen-backend/drivers/xen-pciback")
            .exists()
        {
            return Self::Registered { built_in };
        }
        if built_in || !lists("modules.dep") {
            return Self::Absent;
        }
        let rules = Rules::read(root);
        match (rules.install, rules.blacklist) {
            (true, _) => Self::KeptAway,
            (false, true) => Self::LoadedByName,
            (false, false) => Self::LoadedByAlias,
        }
    }
}

/// The running kernel's version, as its modules' directory is named.
pub(super) fn kernel_release(root: &Path) -> Option<String> {
    let text = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).ok()?;
    Some(text.trim().to_owned())
}

/// The file of a line of `modules.dep` or `modules.builtin`, without directories and endings: `a/b/xen-pciback.ko.xz: ...`.
fn module_of(line: &str) -> &str {
    let path = line.split(':').next().unwrap_or(line);
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file)
}

fn is_backend(module: &str) -> bool {
    module.replace('-', "_") == NAME
}

/// What keeps it from being loaded.
#[derive(Default)]
struct Rules {
    /// Its aliases are not followed.
    blacklist: bool,
    /// A command is run instead of loading it.
    install: bool,
}

impl Rules {
    fn read(root: &Path) -> Self {
        let mut files = BTreeMap::new();
        for directory in DIRECTORIES {
            let entries = fs::read_dir(root.join(directory)).into_iter().flatten();
            for entry in entries.flatten() {
                files
                    .entry(entry.file_name())
                    .or_insert_with(|| entry.path());
            }
        }
        let mut rules = Self::default();
        for path in files.values() {
            if path.extension().is_some_and(|ending| ending == "conf") {
                rules.add(&fs::read_to_string(path).unwrap_or_default());
            }
        }
        let command_line = fs::read_to_string(root.join("proc/cmdline")).unwrap_or_default();
        rules.blacklist |= command_line
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("modprobe.blacklist="))
            .any(|list| list.split(',').any(is_backend));
        rules
    }

    fn add(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("blacklist"), Some(module)) => self.blacklist |= is_backend(module),
                (Some("install"), Some(module)) => self.install |= is_backend(module),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::root;
    use super::*;

    const RELEASE: (&str, &str) = ("proc/sys/kernel/osrelease", "6.1.0-30-amd64\n");
    const MODULE: (&str, &str) = (
        "lib/modules/6.1.0-30-amd64/modules.dep",
        "kernel/drivers/net/tun.ko:\nkernel/drivers/xen/xen-pciback/xen-pciback.ko.xz: kernel/x.ko\n",
    );

    fn find(files: &[(&str, &str)]) -> KernelBackend {
        KernelBackend::find(root(&[&[RELEASE, MODULE], files].concat()).path())
    }

    #[test]
    fn a_module_that_is_there_is_loaded_by_whoever_asks_unless_modprobe_is_told_otherwise() {
        let ours = include_str!("../../packaging/modprobe.conf");
        let path = "etc/modprobe.d/pcibackd.conf";
        assert_eq!(find(&[]), KernelBackend::LoadedByAlias);
        assert_eq!(find(&[(path, ours)]), KernelBackend::KeptAway);
        let blacklist = "blacklist xen_pciback\n";
        assert_eq!(find(&[(path, blacklist)]), KernelBackend::LoadedByName);
        let elsewhere = "usr/lib/modprobe.d/xen.conf";
        assert_eq!(find(&[(elsewhere, ours)]), KernelBackend::KeptAway);
        for text in ["#blacklist xen-pciback", "blacklist xen-pcibackd", ""] {
            assert_eq!(find(&[(path, text)]), KernelBackend::LoadedByAlias);
        }
        assert_eq!(
            find(&[("etc/modprobe.d/readme.txt", blacklist)]),
            KernelBackend::LoadedByAlias
        );
    }

    #[test]
    fn a_file_in_etc_hides_one_of_the_same_name() {
        let files = [
            ("usr/lib/modprobe.d/xen.conf", "blacklist xen-pciback"),
            ("etc/modprobe.d/xen.conf", ""),
        ];
        assert_eq!(find(&files), KernelBackend::LoadedByAlias);
    }

    #[test]
    fn the_kernels_command_line_counts() {
        let line = (
            "proc/cmdline",
            "root=/dev/sda1 modprobe.blacklist=nouveau,xen-pciback quiet",
        );
        assert_eq!(find(&[line]), KernelBackend::LoadedByName);
    }

    #[test]
    fn one_that_serves_guests_is_seen_whatever_the_files_say() {
        let files = [
            ("sys/bus/xen-backend/drivers/xen-pciback/uevent", ""),
            ("etc/modprobe.d/x.conf", "install xen-pciback /bin/false"),
        ];
        assert_eq!(find(&files), KernelBackend::Registered { built_in: false });
    }

    #[test]
    fn a_kernel_without_it_has_none() {
        assert_eq!(
            KernelBackend::find(root(&[RELEASE]).path()),
            KernelBackend::Absent
        );
        assert_eq!(KernelBackend::find(root(&[]).path()), KernelBackend::Absent);
    }
}
