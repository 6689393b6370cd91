//! What becomes of the facade when processes die.

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::Pid;

use super::*;

const PATH: &str = "PCIBACK_TEST_PATH";
const NAME: &str = "PCIBACK_TEST_NAME";

/// This test program again, to run one of the roles below on its main thread.
fn role(name: &str, path: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    let test = format!("{}::{name}", module_path!().split_once("::").unwrap().1);
    command
        .args([
            test.as_str(),
            "--exact",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(PATH, path);
    command
}

fn keeper(path: &Path, name: MountName) -> Result<Keeper, FacadeError> {
    let mut command = role("keeper_process", path);
    Keeper::spawn(command.env(NAME, name.to_string())).map_err(FacadeError::Keeper)
}

fn from_environment(name: &str) -> String {
    std::env::var(name).expect("run by the other tests")
}

#[test]
#[ignore = "a process that the other tests start"]
fn keeper_process() {
    super::keeper::keep(
        Path::new(&from_environment(PATH)),
        from_environment(NAME).parse().ok().unwrap(),
    )
    .unwrap();
}

/// Serves a facade, tells the keeper's process number, and revives the keeper when it dies.
#[test]
#[ignore = "a process that the other tests start"]
fn daemon_process() {
    let real = RealDrivers::open_at(Path::new(&from_environment(PATH))).unwrap();
    let mut facade = Facade::lay_with(real, Arc::new(Memory::default()), keeper).unwrap();
    loop {
        println!("KEEPER {}", facade.keeper.process());
        let mut wait = [PollFd::new(facade.keeper(), PollFlags::POLLIN)];
        poll(&mut wait, PollTimeout::NONE).unwrap();
        facade.keeper = keeper(facade.real.path(), facade.name).unwrap();
    }
}

struct Daemon {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Daemon {
    fn start(machine: &Machine) -> (Self, Pid) {
        let mut child = role("daemon_process", &machine.drivers())
            .process_group(0)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut daemon = Self { child, output };
        let keeper = daemon.next_keeper();
        (daemon, keeper)
    }

    /// Waits for it to tell that it has a keeper.
    fn next_keeper(&mut self) -> Pid {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(
                self.output.read_line(&mut line).unwrap(),
                0,
                "the daemon ended"
            );
            // the test harness writes to the same line
            if let Some((_, number)) = line.split_once("KEEPER ") {
                return Pid::from_raw(number.trim().parse().unwrap());
            }
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn runs(process: Pid) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{process}/stat")) else {
        return false;
    };
    !stat.rsplit_once(')').unwrap().1.starts_with(" Z")
}

#[test]
fn a_killed_daemon_leaves_no_dead_facade() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (daemon, keeper) = Daemon::start(&machine);
    assert!(is_mounted(&machine.drivers()));
    assert_eq!(fs::read_to_string(machine.pciback("slots")).unwrap(), "");
    daemon.kill();
    eventually("the facade is gone", || !is_mounted(&machine.drivers()));
    assert!(machine.drivers().join("e1000e/bind").exists());
    assert!(!machine.pciback("slots").exists());
    eventually("the keeper has ended", || !runs(keeper));
}

#[test]
fn a_keeper_outlives_every_signal_that_can_be_outlived() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (mut daemon, keeper) = Daemon::start(&machine);
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGPIPE,
        Signal::SIGALRM,
    ] {
        kill(keeper, signal).unwrap();
    }
    // Ctrl-C, or a shell that kills its job
    killpg(
        Pid::from_raw(i32::try_from(daemon.child.id()).unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    daemon.child.wait().unwrap();
    eventually("the facade is gone", || !is_mounted(&machine.drivers()));
}

#[test]
fn a_keeper_that_died_is_replaced() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (mut daemon, first) = Daemon::start(&machine);
    kill(first, Signal::SIGKILL).unwrap();
    let second = daemon.next_keeper();
    assert_ne!(first, second);
    assert!(is_mounted(&machine.drivers()));
    daemon.kill();
    eventually("the facade is gone", || !is_mounted(&machine.drivers()));
}

#[test]
fn a_slow_keeper_does_not_touch_the_facade_of_the_next_daemon() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (first, old_keeper) = Daemon::start(&machine);
    kill(old_keeper, Signal::SIGSTOP).unwrap();
    first.kill();
    assert!(
        is_mounted(&machine.drivers()),
        "dead, and nobody there to unmount it"
    );
    assert_eq!(
        fs::metadata(machine.drivers()).unwrap_err().raw_os_error(),
        Some(Errno::ENOTCONN as i32)
    );

    let (second, _keeper) = Daemon::start(&machine);
    assert_eq!(fs::read_to_string(machine.pciback("slots")).unwrap(), "");
    kill(old_keeper, Signal::SIGCONT).unwrap();
    eventually("the old keeper has ended", || !runs(old_keeper));
    assert!(is_mounted(&machine.drivers()));
    assert_eq!(fs::read_to_string(machine.pciback("slots")).unwrap(), "");
    second.kill();
    eventually("the facade is gone, with all that was beneath", || {
        !is_mounted(&machine.drivers())
    });
}

#[test]
fn a_living_daemons_facade_is_not_taken_away() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (daemon, _keeper) = Daemon::start(&machine);
    let process = daemon.child.id();
    match RealDrivers::open_at(&machine.drivers()) {
        Err(FacadeError::Served { process: by, .. }) => assert_eq!(by, process),
        other => panic!("{other:?}"),
    }
    assert!(machine.pciback("slots").exists());
}

#[test]
fn a_stopped_facade_is_unmounted_and_its_keeper_ends() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let real = RealDrivers::open_at(&machine.drivers()).unwrap();
    let facade = Facade::lay_with(real, Arc::new(Memory::default()), keeper).unwrap();
    let keeper = Pid::from_raw(i32::try_from(facade.keeper.process()).unwrap());
    assert!(machine.pciback("slots").exists());
    assert!(!facade.is_gone());
    drop(facade);
    assert!(!is_mounted(&machine.drivers()));
    assert!(!runs(keeper));
}

#[test]
fn a_facade_that_an_operator_unmounts_is_gone() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (_memory, served) = machine.facade();
    assert!(
        Command::new("umount")
            .arg(machine.drivers())
            .status()
            .unwrap()
            .success(),
        "nothing holds it"
    );
    eventually("it is no longer served", || served.server.is_finished());
}

#[test]
fn a_descriptor_that_is_no_mount_is_refused() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let real = RealDrivers::open_at(&machine.drivers()).unwrap();
    let (not_fuse, other_end) = UnixStream::pair().unwrap();
    drop(other_end);
    assert!(matches!(
        serve(OwnedFd::from(not_fuse), Arc::new(Memory::default()), real),
        Err(FacadeError::Serve(_))
    ));
}

/// Runs a command with the facade, which the process at the other end of standard input serves.
#[test]
#[ignore = "a process that the other tests start"]
fn exec_process() {
    let mut command = Command::new("sh");
    command
        .args(["-c", "ls \"$0\"/pciback; cat \"$0\"/pciback/slots; exit 7"])
        .arg(from_environment(PATH));
    let hand_over = |fuse: OwnedFd| {
        let line = std::io::stdin();
        let fds = [fuse.as_raw_fd()];
        sendmsg::<()>(
            line.as_raw_fd(),
            &[IoSlice::new(b"f")],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::empty(),
            None,
        )?;
        let mut word = [0];
        nix::unistd::read(&line, &mut word)?;
        Ok(())
    };
    match exec::exec_at(Path::new(&from_environment(PATH)), command, hand_over) {
        Err(error) => panic!("{error:?}"),
        Ok(never) => match never {},
    }
}

#[test]
#[expect(unsafe_code, reason = "nix hands out received descriptors as numbers")]
fn a_command_gets_the_facade_for_itself_and_its_exit_code_is_kept() {
    use std::io::{Read, Write};
    use std::os::fd::FromRawFd;
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (mut line, theirs) = UnixStream::pair().unwrap();
    let mut command = role("exec_process", &machine.drivers());
    let mut child = command
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(command);

    let mut word = [0; 1];
    let mut buffer = [IoSliceMut::new(&mut word)];
    let mut space = cmsg_space!([i32; 1]);
    let message = recvmsg::<()>(
        line.as_raw_fd(),
        &mut buffer,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .unwrap();
    let rights = message.cmsgs().unwrap().find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: just received, nobody else has it
    let fuse = unsafe { OwnedFd::from_raw_fd(rights.unwrap()) };
    let memory = Arc::new(Memory::default());
    memory.new_slot("0000:00:06.0".parse().unwrap()).unwrap();
    let server = serve(
        fuse,
        memory,
        RealDrivers::open_at(&machine.drivers()).unwrap(),
    )
    .unwrap();
    line.write_all(b"+").unwrap();

    let mut output = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert!(
        output.contains("allow_interrupt_control\nbind\n") && output.contains("0000:00:06.0\n"),
        "{output}"
    );
    assert!(!is_mounted(&machine.drivers()), "outside there is none");
    eventually("its namespace is gone, and so is the facade", || {
        server.is_finished()
    });
}
