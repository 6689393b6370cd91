//! `pciback completions` and `pciback man`: what is made from the definition of the command line itself.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man as Page;

use crate::arguments::Arguments;
use crate::outcome::{CommandError, Outcome};
use crate::output;

const COMPLETIONS: &str = "\
Examples:
  pciback completions bash > /etc/bash_completion.d/pciback
  pciback completions zsh > /usr/local/share/zsh/site-functions/_pciback
  pciback completions fish > /etc/fish/completions/pciback.fish";

/// Sections of the manual (man(1)).
const USER_COMMANDS: &str = "1";
const ADMINISTRATION: &str = "8";

/// What `pciback completions` takes.
#[derive(Debug, Args)]
#[command(after_help = COMPLETIONS)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// What `pciback man` takes.
#[derive(Debug, Args)]
pub struct Man {
    /// Write a page for each command, and the daemon's, into this directory
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
    let mut command = Arguments::command().disable_help_subcommand(true);
    // Names the commands below it.
    command.build();
    let failed = |what: String| move |source| CommandError::Write { what, source };
    let Some(directory) = &arguments.directory else {
        let (_, page) =
            page(command, USER_COMMANDS).map_err(failed("the manual page".to_owned()))?;
        output::print(&page)?;
        return Ok(Outcome::Done);
    };
    let what = || format!("the manual pages into {}", directory.display());
    write_pages(&command, USER_COMMANDS, directory).map_err(failed(what()))?;
    let daemon = pcibackd::arguments::Arguments::command();
    write_pages(&daemon, ADMINISTRATION, directory).map_err(failed(what()))?;
    Ok(Outcome::Done)
}

/// A command's page, and those of the commands below it.
fn write_pages(command: &Command, section: &str, directory: &Path) -> io::Result<()> {
    for below in command
        .get_subcommands()
        .filter(|below| !below.is_hide_set())
    {
        write_pages(below, section, directory)?;
    }
    let (name, page) = page(command.clone(), section)?;
    fs::write(directory.join(name), page)
}

/// File name and text of a manual page. The examples of the help are a section of their own.
fn page(command: Command, section: &str) -> io::Result<(String, String)> {
    let help = command.get_after_long_help().or(command.get_after_help());
    let help = help.map(ToString::to_string).unwrap_or_default();
    let (rest, examples) = split_examples(&help);
    let page = Page::new(command.after_help(rest.clone()).after_long_help(rest)).section(section);
    let mut text = Vec::new();
    page.render(&mut text)?;
    let mut text = String::from_utf8_lossy(&text).into_owned();
    if let Some(examples) = examples {
        let at = text.find(".SH VERSION").unwrap_or(text.len());
        text.insert_str(at, &lines_as_they_are("EXAMPLES", &examples));
    }
    Ok((page.get_filename(), text))
}

/// What a help text says besides its examples, and these, without their indentation.
fn split_examples(help: &str) -> (String, Option<String>) {
    const HEADING: &str = "Examples:\n";
    let Some((before, behind)) = help.split_once(HEADING) else {
        return (help.to_owned(), None);
    };
    let (examples, after) = behind.split_once("\n\n").unwrap_or((behind, ""));
    let lines = examples
        .lines()
        .map(|line| line.strip_prefix("  ").unwrap_or(line));
    let examples = lines.collect::<Vec<_>>().join("\n");
    let rest = [before.trim_end(), after].join("\n\n");
    (rest.trim().to_owned(), Some(examples))
}

/// A section whose lines stay as they are (man(7)).
fn lines_as_they_are(name: &str, text: &str) -> String {
    let mut section = format!(".SH {name}\n.nf\n");
    for line in text.lines() {
        // A dot or a quote would begin a request.
        let line = line.replace('\\', "\\e").replace('-', "\\-");
        section.push_str(&format!("\\&{line}\n"));
    }
    section.push_str(".fi\n");
    section
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_told_apart_from_the_rest() {
        let help = "Before.\n\nExamples:\n  pciback a\n  pciback b | c\n\nAfter.";
        let (rest, examples) = split_examples(help);
        assert_eq!(rest, "Before.\n\nAfter.");
        assert_eq!(examples.unwrap(), "pciback a\npciback b | c");
        assert_eq!(split_examples("Examples:\n  x").0, "");
        assert_eq!(split_examples("Nothing."), ("Nothing.".to_owned(), None));
    }

    #[test]
    fn a_line_of_an_example_is_no_request_of_roff() {
        assert_eq!(
            lines_as_they_are("E", ".x\\-y"),
            ".SH E\n.nf\n\\&.x\\e\\-y\n.fi\n"
        );
    }
}
