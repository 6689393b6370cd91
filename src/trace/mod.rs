//! Guests' operations as they happen, for `pciback trace`: taken from the taps of their sessions, named, filtered and sent to a client.
//!
//! | module | holds |
//! |---|---|
//! | this one | the stream: which guests, how often, until when |
//! | [`decode`] | the names of registers and fields |
//!
//! All of it runs on the client's own thread. A client that is slow, or stopped, costs its guests nothing and misses operations.

pub mod decode;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conf_space::address::Bdf;
use conf_space::overlay::Overlay;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xenbus::DomId;

use self::decode::{Decoder, Layout};
use crate::control::protocol::Response;
use crate::control::traced::{Filter, Traced};
use crate::host::ReadOnly;
use crate::host::devices::Devices;
use crate::session::operation::Outcome;
use crate::session::tap::{Event, Listener, Tap};

/// Between two looks at the taps. A ring holds what a guest can do in this time.
const TICK: Duration = Duration::from_millis(20);
/// Between two looks for guests that have come or gone.
const ROUND: Duration = Duration::from_millis(100);
/// A client that takes nothing for this long is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest that can be listened to.
#[derive(Debug)]
pub struct Source {
    /// Its number.
    pub domain: DomId,
    /// Its name.
    pub name: String,
    /// Its operations.
    pub tap: Arc<Tap>,
}

struct Heard {
    source: Source,
    listener: Listener,
    /// It is still there.
    lives: bool,
}

struct Stream<'a> {
    filter: &'a Filter,
    devices: &'a Devices,
    decoder: Decoder,
    layouts: BTreeMap<Bdf, Option<Layout>>,
    heard: Vec<Heard>,
}

/// Sends the operations that are wanted, until the client goes or `stop` says so. `sources` tells which guests there are.
///
/// # Errors
/// The client's socket's.
pub fn follow(
    filter: &Filter,
    sources: impl Fn() -> Vec<Source>,
    devices: &Devices,
    mut client: &UnixStream,
    stop: impl Fn() -> bool,
) -> io::Result<()> {
    client.set_write_timeout(Some(PATIENCE))?;
    let mut stream = Stream {
        filter,
        devices,
        decoder: Decoder::default(),
        layouts: BTreeMap::new(),
        heard: Vec::new(),
    };
    stream.look_around(sources());
    let guests = stream.heard.iter().map(|heard| heard.source.domain.0);
    let mut lines = Vec::new();
    say(
        &mut lines,
        &Response::Tracing {
            guests: guests.collect(),
        },
    )?;
    let mut looked = Instant::now();
    loop {
        stream.take(&mut lines)?;
        client.write_all(&lines)?;
        lines.clear();
        if stop() || has_gone(client)? {
            return Ok(());
        }
        if looked.elapsed() >= ROUND {
            looked = Instant::now();
            stream.look_around(sources());
        }
    }
}

/// Waits a moment. A client that has anything to say, now that it listens, has gone.
fn has_gone(client: &UnixStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(client.as_fd(), PollFlags::POLLIN)];
    let tick = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO);
    match poll(&mut fds, tick) {
        Err(nix::errno::Errno::EINTR) | Ok(0) => Ok(false),
        Ok(_) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

fn say(lines: &mut Vec<u8>, response: &Response) -> io::Result<()> {
    serde_json::to_writer(&mut *lines, response)?;
    lines.push(b'\n');
    Ok(())
}

impl Stream<'_> {
    /// Listens to guests that have come, and no more to those that have gone.
    fn look_around(&mut self, sources: Vec<Source>) {
        // A device that slept may answer by now.
        self.layouts.retain(|_, layout| layout.is_some());
        for heard in &mut self.heard {
            heard.lives = false;
        }
        for source in sources {
            let known = |heard: &&mut Heard| heard.listener.is_at(&source.tap);
            if let Some(heard) = self.heard.iter_mut().find(known) {
                heard.lives = true;
                continue;
            }
            let wanted =
                self.filter.guest.as_ref().is_none_or(|guest| {
                    *guest == source.name || *guest == source.domain.to_string()
                });
            if wanted {
                self.heard.push(Heard {
                    listener: source.tap.listen(),
                    source,
                    lives: true,
                });
            }
        }
    }

    /// Writes down what was done since the last time.
    fn take(&mut self, lines: &mut Vec<u8>) -> io::Result<()> {
        let mut all: Vec<(usize, Event)> = Vec::new();
        for (guest, heard) in self.heard.iter_mut().enumerate() {
            let mut events = Vec::new();
            let lost = heard.listener.take(&mut events);
            if lost > 0 {
                let domain = heard.source.domain.0;
                say(
                    lines,
                    &Response::Lost {
                        domain,
                        operations: lost,
                    },
                )?;
            }
            all.extend(events.into_iter().map(|event| (guest, event)));
        }
        all.sort_by_key(|(_, event)| event.time);
        for (guest, event) in all {
            if let Some(traced) = self.name(guest, &event) {
                say(lines, &Response::Operation(Box::new(traced)))?;
            }
        }
        self.heard.retain(|heard| heard.lives);
        Ok(())
    }

    fn name(&mut self, guest: usize, event: &Event) -> Option<Traced> {
        let source = &self.heard.get(guest)?.source;
        let layout = event.device.and_then(|device| {
            let layout = self.layouts.entry(device);
            layout
                .or_insert_with(|| layout_of(self.devices, device))
                .as_ref()
        });
        // All are looked at, since some make sense only after others.
        let traced = self
            .decoder
            .decode(event, (source.domain.0, &source.name), layout);
        is_wanted(self.filter, event, &traced).then_some(traced)
    }
}

fn is_wanted(filter: &Filter, event: &Event, traced: &Traced) -> bool {
    use xenbus::pciif::Command::ConfRead;
    let error = !matches!(event.outcome, Outcome::Done | Outcome::Absent);
    filter
        .device
        .is_none_or(|device| event.device == Some(device))
        && (!filter.writes || event.command() != Some(ConfRead))
        && (!filter.errors || error)
        && (filter.commands.is_empty() || filter.commands.contains(&traced.command))
}

/// A device that cannot be read is traced without names.
fn layout_of(devices: &Devices, bdf: Bdf) -> Option<Layout> {
    let device = devices.get(bdf)?;
    let identity = &device.description.identity;
    match Overlay::new(identity, &ReadOnly(&*device.config)) {
        Ok(overlay) => Some(Layout {
            fields: overlay.fields().collect(),
            resources: identity.resources,
        }),
        Err(error) => {
            log::debug!("{bdf}: its registers have no names in a trace: {error}");
            None
        }
    }
}
