//! The facade as the configuration wants it, now and when it is read again: laid by us, or, for a daemon in a sandbox, from outside
//! (`pciback facade`).

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, Weak};
use std::thread;

use log::{debug, error, warn};
use mio::unix::SourceFd;
use mio::{Interest, Registry};

use super::driver::SlotDriver;
use super::{KEEPER, lock_of};
use crate::config::{self, Config};
use crate::facade::{Driver, Facade, RealDrivers};
use crate::text::chain;

/// What those who ask on the control socket are told of the facade, and those of them who keep one for us.
#[derive(Debug, Default)]
pub(super) struct Standing {
    state: Mutex<&'static str>,
    keepers: Mutex<Vec<Weak<UnixStream>>>,
}

impl Standing {
    /// Who sees it: `global`, `private` or `off`.
    pub(super) fn state(&self) -> &'static str {
        *lock_of(&self.state)
    }

    /// Whoever has had us serve a facade may keep the connection, to be told when it is not wanted any more.
    pub(super) fn served(&self, client: &Arc<UnixStream>) {
        let mut keepers = lock_of(&self.keepers);
        keepers.retain(|keeper| keeper.strong_count() > 0);
        keepers.push(Arc::downgrade(client));
    }

    /// We send nothing more, and live: as opposed to a connection that is gone, with us.
    fn dismiss_keepers(&self) {
        for keeper in lock_of(&self.keepers).drain(..) {
            if let Some(keeper) = keeper.upgrade()
                && let Err(error) = keeper.shutdown(std::net::Shutdown::Write)
            {
                // Gone a moment ago.
                debug!("control socket: {error}");
            }
        }
    }
}

/// The facade for everybody, and what it takes to lay it.
#[derive(Debug)]
pub(super) struct Holder {
    drivers: Option<RealDrivers>,
    driver: Arc<SlotDriver>,
    sandboxed: bool,
    laid: Option<Facade>,
    standing: Arc<Standing>,
}

impl Holder {
    /// Without a facade. `drivers`: what to lay it over, if there is anything.
    pub(super) fn new(
        drivers: Option<RealDrivers>,
        driver: Arc<SlotDriver>,
        sandboxed: bool,
    ) -> Self {
        Self {
            drivers,
            driver,
            sandboxed,
            laid: None,
            standing: Arc::default(),
        }
    }

    pub(super) fn standing(&self) -> &Arc<Standing> {
        &self.standing
    }

    /// Has the facade be there, or not, as the configuration says. `registry` is told of its keeper, as [`KEEPER`].
    pub(super) fn follow(&mut self, config: &Config, registry: &Registry) {
        let wanted = config.facade == config::Facade::Global;
        if wanted && !self.sandboxed && self.laid.is_none() {
            self.laid = self.lay();
            self.watch_keeper(registry);
        } else if !wanted && let Some(laid) = self.laid.take() {
            forget_keeper(&laid, registry);
            take_away(laid);
        }
        *lock_of(&self.standing.state) = match config.facade {
            config::Facade::Global if self.sandboxed || self.laid.is_some() => "global",
            config::Facade::Private => "private",
            config::Facade::Global | config::Facade::Off => "off",
        };
        if !wanted {
            // Last: they ask what is wanted then.
            self.standing.dismiss_keepers();
        }
    }

    /// A daemon without a facade still serves its guests: say so and go on.
    fn lay(&self) -> Option<Facade> {
        let real = self.drivers.clone()?;
        Facade::lay(real, Arc::clone(&self.driver) as Arc<dyn Driver>)
            .inspect_err(|error| {
                error!("xl will not find hidden devices, since {}", chain(error));
            })
            .ok()
    }

    fn watch_keeper(&self, registry: &Registry) {
        if let Some(laid) = &self.laid
            && let Err(error) = registry.register(
                &mut SourceFd(&laid.keeper().as_raw_fd()),
                KEEPER,
                Interest::READABLE,
            )
        {
            error!("the facade's keeper will not be replaced when it dies: {error}");
        }
    }

    /// The keeper has died: there is to be another.
    pub(super) fn revive_keeper(&mut self, registry: &Registry) {
        let Some(laid) = &mut self.laid else { return };
        forget_keeper(laid, registry);
        if laid.is_gone() {
            warn!(
                "the facade was unmounted by somebody else; xl finds no hidden devices until pcibackd is restarted"
            );
            self.laid = None;
            return;
        }
        match laid.revive_keeper() {
            Ok(()) => {
                warn!("the keeper of the facade had died; another one was started");
                self.watch_keeper(registry);
            }
            Err(error) => error!("{}", chain(&error)),
        }
    }
}

fn forget_keeper(laid: &Facade, registry: &Registry) {
    if let Err(error) = registry.deregister(&mut SourceFd(&laid.keeper().as_raw_fd())) {
        warn!("{error}");
    }
}

/// Those who are in it get what they wait for first, a reset for one: on a thread of its own.
fn take_away(laid: Facade) {
    let thread = thread::Builder::new().name("facade".into());
    if let Err(error) = thread.spawn(move || drop(laid)) {
        // The closure, and the facade with it, is gone all the same.
        warn!("the facade was taken away without a thread for it: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn who_keeps_a_facade_is_told_when_it_is_not_wanted_and_who_has_gone_is_forgotten() {
        let standing = Standing::default();
        let pair = || UnixStream::pair().unwrap();
        let (gone, _) = pair();
        standing.served(&Arc::new(gone));
        let (ours, mut theirs) = pair();
        let ours = Arc::new(ours);
        standing.served(&ours);
        assert_eq!(lock_of(&standing.keepers).len(), 1);
        standing.dismiss_keepers();
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        // We still hear of the other's end.
        drop(theirs);
        assert_eq!((&*ours).read(&mut [0]).unwrap(), 0);
    }
}
