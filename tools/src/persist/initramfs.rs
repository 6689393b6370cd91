//! Making the initramfs anew, which holds the list of devices to reserve.

use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::output;

/// What makes initramfs images: program and arguments. Debian's first, since dracut may be there for other purposes.
const MAKERS: [&[&str]; 2] = [
    &["/usr/sbin/update-initramfs", "-u", "-k", "all"],
    &["/usr/bin/dracut", "--force", "--regenerate-all"],
];

/// The initramfs could not be made anew.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// There is nothing to make one with.
    #[error(
        "there is neither update-initramfs nor dracut here, so only the udev rule hides the devices at boot, and a driver that is loaded for another \
         device may be faster; an initramfs of your own should run /usr/lib/pciback/reserve before udev (--no-initramfs: it is all right)"
    )]
    NoMaker,
    /// It failed.
    #[error("'{command}' failed ({status}); its messages above say why, then: pciback persist")]
    Failed {
        /// What was run.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// It could not be run.
    #[error("cannot run '{command}'")]
    Run {
        /// What was to be run.
        command: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Makes all of them anew with what the system has for it. Takes from seconds to minutes; its messages are shown, all on standard error: programs
/// may be reading the other.
///
/// # Errors
/// [`InitramfsError`].
pub fn make() -> Result<(), InitramfsError> {
    let maker = MAKERS.iter().find_map(|maker| {
        let (program, arguments) = maker.split_first()?;
        Path::new(program).exists().then_some((program, arguments))
    });
    let Some((program, arguments)) = maker else {
        return Err(InitramfsError::NoMaker);
    };
    let command = format!("{program} {}", arguments.join(" "));
    output::tell(&format!(
        "making the initramfs anew ({command}); this takes a while"
    ));
    let began = Instant::now();
    let status = Command::new(program)
        .args(arguments)
        .stdout(io::stderr())
        .status();
    match status {
        Ok(status) if status.success() => {
            output::tell(&format!(
                "the initramfs is made ({} s)",
                began.elapsed().as_secs()
            ));
            Ok(())
        }
        Ok(status) => Err(InitramfsError::Failed { command, status }),
        Err(source) => Err(InitramfsError::Run { command, source }),
    }
}
