//! Where consoles are, told to whoever looks for them.

use log::{info, warn};
use xenbus::xenstore::Store;
use xenbus::{DomId, Xen};

use super::backends::Terminal;
use super::place::At;
use crate::text::chain;

/// Tells `xl console -t serial -n NUMBER` where a console is. Nobody needs it to have the console, so a failure is only logged.
pub(super) fn announce(xen: &dyn Xen, domain: DomId, terminals: &[(At, Terminal)]) {
    for (at, terminal) in terminals {
        let path = terminal.path.display();
        let Some(port) = &terminal.port else {
            info!("domain {domain}: the console in {at} is at {path}");
            let node = format!("/local/domain/{domain}/serial/{}/tty", at.number());
            let written = xen
                .connect_xenstore()
                .and_then(|mut store| store.write(&node, path.to_string()));
            if let Err(error) = written {
                warn!(
                    "domain {domain}: xl console does not know of it: {}",
                    chain(&error)
                );
            }
            continue;
        };
        info!("domain {domain}: the port {port} in {at} is at {path}");
    }
}
