//! Facades that come and go. What happens when processes die is in `tests/facade.rs`.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::*;

#[test]
fn a_facade_that_an_operator_unmounts_is_gone() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    assert_eq!(laid_over(&machine.drivers()).unwrap(), Laid::No);
    let (_memory, served) = machine.facade();
    let process = std::process::id();
    assert_eq!(
        laid_over(&machine.drivers()).unwrap(),
        Laid::Alive { process }
    );
    assert!(
        Command::new("umount")
            .arg(machine.drivers())
            .status()
            .unwrap()
            .success(),
        "nothing holds it"
    );
    eventually("it is no longer served", || served.server.is_finished());
    assert_eq!(laid_over(&machine.drivers()).unwrap(), Laid::No);
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

/// Where [`exec_process`] finds the drivers.
const PATH: &str = "PCIBACK_TEST_PATH";

/// Runs a command with the facade, which the process at the other end of standard input serves.
#[test]
#[ignore = "a process that the next test starts"]
fn exec_process() {
    let path = PathBuf::from(std::env::var_os(PATH).expect("run by the next test"));
    let mut command = Command::new("sh");
    command
        .args(["-c", "ls \"$0\"/pciback; cat \"$0\"/pciback/slots; exit 7"])
        .arg(&path);
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
    match exec::exec_at(&path, command, hand_over) {
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
    let (_, test) = concat!(module_path!(), "::exec_process")
        .split_once("::")
        .unwrap();
    let mut command = Command::new("/proc/self/exe");
    command
        .args([test, "--exact", "--ignored", "--nocapture"])
        .env(PATH, machine.drivers());
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
