//! Asking the daemon.

use std::path::Path;

use pcibackd::control::client;
use pcibackd::control::protocol::{Request, Response};

use crate::outcome::CommandError;

/// Asks the daemon and takes from its answer what `expected` finds in it.
pub fn ask<T>(
    run_dir: &Path,
    request: &Request,
    expected: impl FnOnce(Response) -> Option<T>,
) -> Result<T, CommandError> {
    understand(client::ask(run_dir, request)?, expected)
}

/// Takes from an answer what `expected` finds in it.
pub fn understand<T>(
    response: Response,
    expected: impl FnOnce(Response) -> Option<T>,
) -> Result<T, CommandError> {
    match response {
        Response::Failed { message } => Err(CommandError::Refused(message)),
        other => expected(other).ok_or(CommandError::Answer),
    }
}
