//! Gathering the facts about the host.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::modules::{KernelBackend, kernel_release};
use crate::facade::{self, Laid};

/// What there is to say about the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// What this is to Xen.
    pub role: Role,
    /// Xen's version.
    pub version: Option<String>,
    /// What the daemon says of itself, or why there is none.
    pub daemon: Result<RunningDaemon, String>,
    /// Whether xenstored can be reached, or why not.
    pub xenstore: Result<(), String>,
    /// Whether Xen uses an IOMMU; `None`: `xl` does not tell.
    pub iommu: Option<bool>,
    /// Whether Xen remaps interrupts; `None`: `xl dmesg` does not tell any more.
    pub interrupt_remapping: Option<bool>,
    /// How far the kernel locks itself down.
    pub lockdown: Lockdown,
    /// The kernel's own backend.
    pub kernel_backend: KernelBackend,
    /// The kernel knows FUSE, or has it as a module.
    pub fuse: Fuse,
    /// What lies over `/sys/bus/pci/drivers`; `None`: it cannot be found out.
    pub facade: Option<Laid>,
}

/// What this system is to Xen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It does not run on Xen.
    None,
    /// It is a guest.
    Guest,
    /// It is dom0, a PV domain as usual.
    Dom0,
    /// It is dom0, and a PVH domain (`dom0=pvh` on Xen's command line).
    PvhDom0,
}

impl Role {
    /// Whether it is a dom0 of either kind.
    pub fn is_dom0(self) -> bool {
        matches!(self, Self::Dom0 | Self::PvhDom0)
    }
}

/// A daemon that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningDaemon {
    /// Its version.
    pub version: String,
    /// `global`, `private` or `off`.
    pub facade: String,
}

/// `/sys/kernel/security/lockdown`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lockdown {
    /// None, or the kernel has no such thing.
    None,
    /// Configuration space cannot be written.
    On,
}

/// Whether there is FUSE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fuse {
    /// Yes.
    There,
    /// As a module that is not loaded.
    Module,
    /// No.
    Missing,
}

impl HostFacts {
    /// Looks around. `root` is the directory that `sys`, `proc` and the others are in; `xl` runs xl with an argument and returns what it
    /// prints.
    pub fn gather(
        root: &Path,
        xl: impl Fn(&str) -> Option<String>,
        daemon: Result<RunningDaemon, String>,
        xenstore: Result<(), String>,
    ) -> Self {
        let role = role(root);
        let ask = |argument| role.is_dom0().then(|| xl(argument)).flatten();
        Self {
            role,
            version: version(root),
            daemon,
            xenstore,
            iommu: ask("info").as_deref().and_then(has_iommu),
            interrupt_remapping: ask("dmesg").as_deref().and_then(remaps_interrupts),
            lockdown: lockdown(root),
            kernel_backend: KernelBackend::find(root),
            fuse: fuse(root),
            facade: facade::laid_over(&root.join("sys/bus/pci/drivers")).ok(),
        }
    }
}

fn read(root: &Path, path: &str) -> Option<String> {
    let text = fs::read_to_string(root.join(path)).ok()?;
    Some(text.trim().to_owned())
}

fn role(root: &Path) -> Role {
    if read(root, "sys/hypervisor/type").as_deref() != Some("xen") {
        return Role::None;
    }
    // xenfs may not be mounted; the control domain's UUID is zero.
    let control =
        read(root, "proc/xen/capabilities").is_some_and(|text| text.contains("control_d"));
    let zero = read(root, "sys/hypervisor/uuid")
        .is_some_and(|uuid| uuid.bytes().all(|byte| matches!(byte, b'0' | b'-')));
    if !control && !zero {
        return Role::Guest;
    }
    // Since Linux 4.13.
    match read(root, "sys/hypervisor/guest_type").as_deref() {
        Some("PVH") => Role::PvhDom0,
        _ => Role::Dom0,
    }
}

fn version(root: &Path) -> Option<String> {
    let part = |name| read(root, &format!("sys/hypervisor/version/{name}"));
    Some(format!(
        "{}.{}{}",
        part("major")?,
        part("minor")?,
        part("extra")?
    ))
}

/// From `virt_caps` of `xl info`: `hvm_directio` and `pv_directio`, before Xen 4.13 `directio`, are there if Xen uses an IOMMU.
fn has_iommu(info: &str) -> Option<bool> {
    let line = info.lines().find(|line| line.starts_with("virt_caps"))?;
    Some(line.contains("directio"))
}

/// From what Xen said when it booted, if its buffer still has that.
fn remaps_interrupts(dmesg: &str) -> Option<bool> {
    dmesg.lines().find_map(|line| {
        let line = line.strip_prefix("(XEN) ")?;
        // With `console_timestamps` its time comes first.
        let (_, line) = line
            .strip_prefix('[')
            .map_or(Some(("", line)), |line| line.split_once("] "))?;
        // Not in the middle of a line: that is what a guest says.
        Some(line.strip_prefix("Interrupt remapping ")? == "enabled")
    })
}

/// The word in brackets is the one that holds: `none [integrity] confidentiality`.
fn lockdown(root: &Path) -> Lockdown {
    match read(root, "sys/kernel/security/lockdown") {
        Some(text) if !text.contains("[none]") => Lockdown::On,
        _ => Lockdown::None,
    }
}

fn fuse(root: &Path) -> Fuse {
    let known = read(root, "proc/filesystems").is_some_and(|text| {
        text.lines()
            .any(|line| line.trim_start_matches("nodev").trim() == "fuse")
    });
    if known {
        return Fuse::There;
    }
    let module = kernel_release(root)
        .and_then(|release| read(root, &format!("lib/modules/{release}/modules.dep")))
        .is_some_and(|text| text.contains("/fuse.ko"));
    if module { Fuse::Module } else { Fuse::Missing }
}

/// Runs `xl` with one argument: what it prints, unless it fails or takes too long.
pub fn run_xl(argument: &str) -> Option<String> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut child = Command::new("xl")
        .arg(argument)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut out = child.stdout.take()?;
    let (done, wait) = mpsc::channel();
    thread::spawn(move || {
        let mut text = Vec::new();
        // Whoever waits may have given up.
        let _ = done.send(out.read_to_end(&mut text).map(|_| text));
    });
    let text = wait.recv_timeout(PATIENCE);
    // Its end, unless it has come to that already.
    let _ = child.kill();
    let _ = child.wait();
    Some(String::from_utf8_lossy(&text.ok()?.ok()?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::super::root;
    use super::*;

    #[test]
    fn a_control_domain_is_told_from_a_guest_and_from_a_machine_without_xen() {
        let role = |files: &[(&str, &str)]| role(root(files).path());
        let xen = ("sys/hypervisor/type", "xen\n");
        let zero = "00000000-0000-0000-0000-000000000000\n";
        assert_eq!(role(&[]), Role::None);
        assert_eq!(role(&[("sys/hypervisor/type", "lpar\n")]), Role::None);
        assert_eq!(role(&[xen, ("sys/hypervisor/uuid", zero)]), Role::Dom0);
        let capabilities = ("proc/xen/capabilities", "control_d\n");
        assert_eq!(role(&[xen, capabilities]), Role::Dom0);
        let kind = |kind| ("sys/hypervisor/guest_type", kind);
        assert_eq!(role(&[xen, capabilities, kind("PV\n")]), Role::Dom0);
        assert_eq!(role(&[xen, capabilities, kind("PVH\n")]), Role::PvhDom0);
        let guest = (
            "sys/hypervisor/uuid",
            "6ad0f57c-1111-2222-3333-444444444444\n",
        );
        assert_eq!(role(&[xen, guest, kind("PVH\n")]), Role::Guest);
        assert_eq!(role(&[xen]), Role::Guest);
    }

    #[test]
    fn xl_tells_of_the_iommu() {
        let with = "nr_cpus : 2\nvirt_caps              : pv hvm hvm_directio pv_directio hap\n";
        assert_eq!(has_iommu(with), Some(true));
        assert_eq!(has_iommu("virt_caps : pv hvm hap\n"), Some(false));
        assert_eq!(has_iommu("nr_cpus : 2\n"), None);
    }

    #[test]
    fn xens_boot_messages_tell_of_interrupt_remapping() {
        let text = "(XEN) I/O virtualisation enabled\n(XEN) Interrupt remapping enabled\n";
        assert_eq!(remaps_interrupts(text), Some(true));
        assert_eq!(
            remaps_interrupts("(XEN) Interrupt remapping disabled\n"),
            Some(false)
        );
        assert_eq!(remaps_interrupts("(XEN) d1v0 something\n"), None);
        assert_eq!(
            remaps_interrupts("(XEN) [    1.5] Interrupt remapping enabled\n"),
            Some(true)
        );
        let guest = "(d1) Interrupt remapping enabled\n(XEN) d1 Interrupt remapping enabled\n";
        assert_eq!(remaps_interrupts(guest), None);
    }

    #[test]
    fn the_word_in_brackets_is_the_lockdown_that_holds() {
        let lockdown = |text| lockdown(root(&[("sys/kernel/security/lockdown", text)]).path());
        assert_eq!(lockdown("[none] integrity confidentiality"), Lockdown::None);
        assert_eq!(lockdown("none [integrity] confidentiality"), Lockdown::On);
        assert_eq!(lockdown("none integrity [confidentiality]"), Lockdown::On);
        assert_eq!(super::lockdown(root(&[]).path()), Lockdown::None);
    }

    #[test]
    fn fuse_is_known_to_the_kernel_or_a_module() {
        let fuse = |files: &[(&str, &str)]| fuse(root(files).path());
        let known = ("proc/filesystems", "nodev\tsysfs\n\text4\nnodev\tfuse\n");
        let others = ("proc/filesystems", "nodev\tfusectl\n\tfuseblk\n");
        let release = ("proc/sys/kernel/osrelease", "6.1\n");
        let module = ("lib/modules/6.1/modules.dep", "kernel/fs/fuse/fuse.ko:\n");
        assert_eq!(fuse(&[known]), Fuse::There);
        assert_eq!(fuse(&[others, release, module]), Fuse::Module);
        assert_eq!(fuse(&[others, release]), Fuse::Missing);
    }
}
