//! What the lab's guests run: measured configuration accesses, and a PCI frontend that misbehaves.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

mod config;
mod frontend;
mod misbehave;
mod random;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "usage:
  lab-guest bench BDF COUNT      times COUNT 4-byte reads and 2-byte writes of the command register; prints median and 99th percentile
  lab-guest reads BDF FILE       reads the vendor and device ID until FILE exists; prints how often, how often wrong, and the longest wait
  lab-guest deaf               plays a PCI frontend that says it handles errors of devices, and answers nothing until it is killed
  lab-guest misbehave SECONDS    plays a PCI frontend, without the kernel's, that is hostile in every way it knows; SECONDS for each";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("lab-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

/// False when the arguments are none of the usage's.
fn run(arguments: &[&str]) -> Result<bool, Box<dyn Error>> {
    match arguments {
        ["bench", bdf, count] => config::bench(bdf, count.parse()?)?,
        ["reads", bdf, file] => config::reads(bdf, Path::new(file))?,
        ["deaf"] => misbehave::deaf()?,
        ["misbehave", seconds] => misbehave::misbehave(Duration::from_secs(seconds.parse()?))?,
        _ => return Ok(false),
    }
    Ok(true)
}
