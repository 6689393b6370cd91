//! `pciback completions` and `pciback man`: what is made from the definition of the command line itself.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man as Page;

use crate::arguments::Arguments;
use crate::outcome::{CommandError, Outcome};
use crate::output;

/// What `pciback completions` takes.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// What `pciback man` takes.
#[derive(Debug, Args)]
pub struct Man {
    /// Write a page for each command into this directory
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

/// Prints a completion script.
pub fn completions(arguments: &Completions) -> Result<Outcome, CommandError> {
    let mut script = Vec::new();
    clap_complete::generate(
        arguments.shell,
        &mut Arguments::command(),
        "pciback",
        &mut script,
    );
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(Outcome::Done)
}

/// Prints the manual page, or writes all of them.
pub fn man(arguments: &Man) -> Result<Outcome, CommandError> {
    let command = Arguments::command();
    let Some(directory) = &arguments.directory else {
        let mut page = Vec::new();
        let failed = |source| CommandError::Write {
            what: "the manual page".to_owned(),
            source,
        };
        Page::new(command).render(&mut page).map_err(failed)?;
        output::print(&String::from_utf8_lossy(&page))?;
        return Ok(Outcome::Done);
    };
    clap_mangen::generate_to(command, directory).map_err(|source| CommandError::Write {
        what: format!("the manual pages into {}", directory.display()),
        source,
    })?;
    Ok(Outcome::Done)
}
