//! What becomes of the facade when processes die: real FUSE, real processes, real signals.
//!
//! Not run by the usual harness: this program is also the daemon that gets killed and the keeper that outlives it, and these are to be processes with one
//! thread and a `main` of their own.
#![allow(clippy::unwrap_used, clippy::arithmetic_side_effects)]

mod in_turn;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{env, thread};

use conf_space::address::Bdf;
use conf_space::overlay::quirk::DeviceQuirk;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use pcibackd::config::Config;
use pcibackd::control::client;
use pcibackd::control::protocol::{Request, Response};
use pcibackd::daemon::Background;
use pcibackd::facade::{
    DRIVERS, Driver, Facade, FacadeError, Laid, RealDrivers, laid_over, run_if_keeper,
};
use pcibackd::host::sim::SimBus;
use pcibackd::memory::keep_small;
use tempfile::TempDir;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(20);
const DAEMON: &str = "facade-test-daemon";

fn main() -> ExitCode {
    if let Some(code) = run_if_keeper() {
        return code;
    }
    keep_small();
    if env::args().next().as_deref() == Some(DAEMON) {
        daemon(Path::new(&env::args().nth(1).unwrap()));
    }
    if let Err(why) = own_namespace() {
        println!("SKIPPED: all tests of the facade's keeper: {why}");
        return ExitCode::SUCCESS;
    }
    in_turn::play(in_turn::tests![
        a_killed_daemon_leaves_no_dead_facade,
        who_waits_for_a_killed_daemon_gets_an_error,
        a_keeper_outlives_every_signal_but_sigkill,
        a_keeper_that_died_is_replaced,
        a_slow_keeper_does_not_touch_the_next_facade,
        without_keeper_the_next_daemon_clears_up,
        a_living_daemons_facade_is_not_taken_away,
        a_stopped_facade_is_unmounted_and_its_keeper_ends,
        facades_that_come_and_go_leave_the_process_small,
        a_configuration_is_checked_while_a_facade_is_in_place,
        a_daemons_facade_comes_and_goes_as_its_configuration_says,
    ])
}

fn own_namespace() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| {
            mount(
                None::<&str>,
                "/",
                None::<&str>,
                MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                None::<&str>,
            )
        })
        .map_err(|error| format!("no mount namespace here ({error}); run as root"))?;
    match fs::File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("no /dev/fuse here ({error}); `modprobe fuse`")),
    }
}

/// Serves a facade until it is killed, and revives its keeper.
fn daemon(drivers: &Path) -> ! {
    let real = RealDrivers::open_at(drivers).unwrap();
    let mut facade = Facade::lay(real, Arc::new(Slots::default())).unwrap();
    loop {
        println!("serving");
        let mut wait = [PollFd::new(facade.keeper(), PollFlags::POLLIN)];
        poll(&mut wait, PollTimeout::NONE).unwrap();
        facade.revive_keeper().unwrap();
    }
}

/// A backend that has slots and nothing else.
#[derive(Default)]
struct Slots(Mutex<BTreeSet<Bdf>>);

impl Driver for Slots {
    fn seized(&self) -> Vec<Bdf> {
        Vec::new()
    }
    fn slots(&self) -> Vec<Bdf> {
        self.0.lock().unwrap().iter().copied().collect()
    }
    fn new_slot(&self, device: Bdf) -> Result<(), Errno> {
        self.0.lock().unwrap().insert(device);
        Ok(())
    }
    fn remove_slot(&self, device: Bdf) -> Result<(), Errno> {
        if self.0.lock().unwrap().remove(&device) {
            Ok(())
        } else {
            Err(Errno::ENOENT)
        }
    }
    fn bind(&self, _device: Bdf) -> Result<(), Errno> {
        Err(Errno::ENODEV)
    }
    fn unbind(&self, _device: Bdf) -> Result<(), Errno> {
        Err(Errno::ENODEV)
    }
    fn permissive(&self) -> Vec<Bdf> {
        Vec::new()
    }
    fn set_permissive(&self, _device: Bdf) -> Result<(), Errno> {
        Err(Errno::ENODEV)
    }
    fn interrupt_control(&self) -> Vec<Bdf> {
        Vec::new()
    }
    fn allow_interrupt_control(&self, _device: Bdf) -> Result<(), Errno> {
        Err(Errno::ENODEV)
    }
    fn quirks(&self) -> String {
        String::new()
    }
    fn add_quirk(&self, _quirk: DeviceQuirk) -> Result<(), Errno> {
        Err(Errno::ENODEV)
    }
    fn irq_handlers(&self) -> String {
        String::new()
    }
    fn turn_irq_handler(&self, _device: Bdf) -> Result<(), Errno> {
        Err(Errno::ENOENT)
    }
    /// Takes for ever.
    fn reset(&self, _device: Bdf) -> Result<(), Errno> {
        println!("resetting");
        loop {
            thread::park();
        }
    }
}

/// A directory of drivers.
struct Machine(TempDir);

impl Machine {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(directory.path().join("devices")).unwrap();
        fs::create_dir_all(directory.path().join("drivers/e1000e")).unwrap();
        Self(directory)
    }

    fn drivers(&self) -> PathBuf {
        self.0.path().join("drivers")
    }

    fn is_mounted(&self) -> bool {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mountinfo
            .lines()
            .any(|line| line.contains(&format!(" {} ", self.drivers().display())))
    }

    /// Whether the facade is there and answers.
    fn is_served(&self) -> bool {
        fs::read_to_string(self.drivers().join("pciback/slots")).is_ok_and(|slots| slots.is_empty())
    }

    /// Whether there is the real directory and nothing over it.
    fn is_bare(&self) -> bool {
        !self.is_mounted()
            && self.drivers().join("e1000e").exists()
            && !self.drivers().join("pciback").exists()
    }

    /// The keepers of this directory that run.
    fn keepers(&self) -> BTreeSet<Pid> {
        let start = format!("pcibackd-keeper\0{}\0", self.drivers().display());
        let processes = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        processes
            .filter(|process| {
                fs::read_to_string(format!("/proc/{process}/cmdline"))
                    .is_ok_and(|line| line.starts_with(&start))
            })
            .map(Pid::from_raw)
            .collect()
    }

    fn keeper(&self) -> Pid {
        let keepers = self.keepers();
        assert_eq!(keepers.len(), 1);
        *keepers.first().unwrap()
    }
}

struct Daemon {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Daemon {
    fn start(machine: &Machine) -> Self {
        let mut command = Command::new("/proc/self/exe");
        let mut child = command
            .arg0(DAEMON)
            .arg(machine.drivers())
            .process_group(0)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut daemon = Self { child, output };
        daemon.await_word("serving\n");
        assert!(machine.is_served());
        daemon
    }

    /// Waits until it says something.
    fn await_word(&mut self, word: &str) {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, word);
    }

    fn process(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }
}

/// As `kill -9` does it.
impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LONG, "not within {LONG:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn a_killed_daemon_leaves_no_dead_facade() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine);
    drop(daemon);
    eventually("the facade is gone", || machine.is_bare());
    eventually("the keeper has ended", || machine.keepers().is_empty());
}

fn who_waits_for_a_killed_daemon_gets_an_error() {
    let machine = Machine::new();
    let mut daemon = Daemon::start(&machine);
    let mut shell = Command::new("sh");
    shell.args(["-c", "echo 0000:00:05.0 > \"$0\""]);
    let reset = machine.drivers().join("pciback/do_flr");
    let mut client = shell.arg(reset).stderr(Stdio::null()).spawn().unwrap();
    daemon.await_word("resetting\n");
    assert!(client.try_wait().unwrap().is_none());
    drop(daemon);
    assert!(!client.wait().unwrap().success());
    eventually("the facade is gone", || machine.is_bare());
}

fn a_keeper_outlives_every_signal_but_sigkill() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine);
    let keeper = machine.keeper();
    for signal in
        Signal::iterator().filter(|signal| !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP))
    {
        kill(keeper, signal).unwrap();
    }
    // a shell that kills its job takes the whole process group
    killpg(daemon.process(), Signal::SIGKILL).unwrap();
    eventually("the facade is gone", || machine.is_bare());
    drop(daemon);
}

fn a_keeper_that_died_is_replaced() {
    let machine = Machine::new();
    let mut daemon = Daemon::start(&machine);
    let first = machine.keeper();
    kill(first, Signal::SIGKILL).unwrap();
    daemon.await_word("serving\n");
    assert_ne!(machine.keeper(), first);
    assert!(machine.is_served());
    drop(daemon);
    eventually("the facade is gone", || machine.is_bare());
}

fn a_slow_keeper_does_not_touch_the_next_facade() {
    let machine = Machine::new();
    let first = Daemon::start(&machine);
    let old_keeper = machine.keeper();
    kill(old_keeper, Signal::SIGSTOP).unwrap();
    drop(first);
    assert_eq!(
        fs::metadata(machine.drivers()).unwrap_err().raw_os_error(),
        Some(Errno::ENOTCONN as i32),
        "it is dead"
    );

    let second = Daemon::start(&machine);
    kill(old_keeper, Signal::SIGCONT).unwrap();
    eventually("the old keeper has ended", || {
        !machine.keepers().contains(&old_keeper)
    });
    assert!(machine.is_served());
    drop(second);
    eventually("the facade is gone, with all that was beneath", || {
        machine.is_bare()
    });
}

fn without_keeper_the_next_daemon_clears_up() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine);
    kill(machine.keeper(), Signal::SIGSTOP).unwrap();
    let keeper = machine.keeper();
    drop(daemon);
    kill(keeper, Signal::SIGKILL).unwrap();
    assert!(machine.is_mounted());
    assert_eq!(laid_over(&machine.drivers()).unwrap(), Laid::Dead);
    RealDrivers::open_at(&machine.drivers()).unwrap();
    assert!(machine.is_bare());
}

fn a_living_daemons_facade_is_not_taken_away() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine);
    match RealDrivers::open_at(&machine.drivers()) {
        Err(FacadeError::Served { process, .. }) => assert_eq!(process, daemon.child.id()),
        other => panic!("{other:?}"),
    }
    assert!(machine.is_served());
}

fn a_stopped_facade_is_unmounted_and_its_keeper_ends() {
    let machine = Machine::new();
    let facade = Facade::lay(
        RealDrivers::open_at(&machine.drivers()).unwrap(),
        Arc::new(Slots::default()),
    )
    .unwrap();
    assert!(machine.is_served());
    machine.keeper();
    assert!(!facade.is_gone());
    drop(facade);
    assert!(machine.is_bare());
    assert!(machine.keepers().is_empty());
}

fn facades_that_come_and_go_leave_the_process_small() {
    let machine = Machine::new();
    for _ in 0..5 {
        let real = RealDrivers::open_at(&machine.drivers()).unwrap();
        let facade = Facade::lay(real, Arc::new(Slots::default())).unwrap();
        assert!(machine.is_served());
        drop(facade);
        eventually("its threads have ended", || in_status("Threads:") == 1);
    }
    let kib = in_status("RssAnon:");
    assert!(kib < 4096, "{kib} KiB");
}

/// The host's own directory, in this process's mount namespace alone.
fn a_configuration_is_checked_while_a_facade_is_in_place() {
    if !Path::new(DRIVERS).exists() {
        println!("SKIPPED: this machine has no PCI drivers");
        return;
    }
    let facade = Facade::lay(RealDrivers::open().unwrap(), Arc::new(Slots::default())).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, "[[device]]\nid = \"ffff:0001\"\n").unwrap();
    let mut pcibackd = Command::new(env!("CARGO_BIN_EXE_pcibackd"));
    let checked = pcibackd.arg("--check-config").arg(file.path()).output();
    let said = String::from_utf8(checked.unwrap().stderr).unwrap();
    assert!(
        said.contains("line 1: no device of this host matches"),
        "{said}"
    );
    assert!(!facade.is_gone());
}

fn a_daemons_facade_comes_and_goes_as_its_configuration_says() {
    let drivers = Machine::new();
    let run_dir = tempfile::tempdir().unwrap();
    let file = run_dir.path().join("pcibackd.toml");
    let write = |facade: &str| fs::write(&file, format!("facade = \"{facade}\"\n")).unwrap();
    write("off");
    let xen = xenbus::sim::Machine::new(run_dir.path()).unwrap();
    let bus = SimBus::with_example_devices(&xen);
    let daemon = Background::start_with_drivers(
        Arc::new(xen),
        bus,
        RealDrivers::open_at(&drivers.drivers()).unwrap(),
        run_dir.path().to_owned(),
        Config::load(Some(&file)).unwrap(),
    )
    .unwrap();
    assert!(drivers.is_bare());
    for (facade, is_there) in [
        ("global", true),
        ("private", false),
        ("global", true),
        ("off", false),
    ] {
        write(facade);
        daemon.reload().unwrap();
        eventually(&format!("facade = {facade}"), || {
            let Ok(Response::Status(status)) = client::ask(run_dir.path(), &Request::Status) else {
                panic!("no status");
            };
            status.facade == facade
                && drivers.is_served() == is_there
                && drivers.is_bare() != is_there
        });
    }
    daemon.stop().unwrap();
}

/// A number in this process's status.
fn in_status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}
