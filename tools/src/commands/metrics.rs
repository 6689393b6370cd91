//! `pciback metrics`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use clap::Args;
use pcibackd::control::client::ClientError;
use pcibackd::metrics::SOCKET;

use crate::outcome::{CommandError, Outcome};
use crate::output;

const HELP: &str = "\
This is for Prometheus' node exporter, which reads such text from files; Prometheus itself can scrape a port
(metrics = \"127.0.0.1:9465\" in the configuration), and 'curl --unix-socket' the socket metrics.sock.

Examples:
  pciback metrics
  pciback metrics > /var/lib/prometheus/node-exporter/pciback.prom";

/// What `pciback metrics` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Metrics {}

/// Prints the metrics.
pub fn run(run_dir: &Path, _: &Metrics) -> Result<Outcome, CommandError> {
    let path = run_dir.join(SOCKET);
    let stream =
        UnixStream::connect(&path).map_err(|source| ClientError::NoDaemon { path, source })?;
    let page = scrape(stream).map_err(ClientError::NoAnswer)?;
    output::print(&page)?;
    Ok(Outcome::Done)
}

fn scrape(mut stream: impl Read + Write) -> io::Result<String> {
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((header, page)) if header.starts_with("HTTP/1.0 200 ") => Ok(page.to_owned()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
