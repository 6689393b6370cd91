//! A harness for tests whose processes are to be their own: one after the other, in the thread that has begun.

use std::env;
use std::panic::catch_unwind;
use std::process::ExitCode;

/// Tests, each with its name.
macro_rules! tests {
    ($($test:ident,)*) => {
        &[$((stringify!($test), $test as fn()),)*]
    };
}
pub(crate) use tests;

/// Plays those whose names contain one of the program's arguments, or all if there is none.
pub fn play(tests: &[(&str, fn())]) -> ExitCode {
    let filters: Vec<String> = env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let mut code = ExitCode::SUCCESS;
    for (name, test) in tests {
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter)) {
            continue;
        }
        let passed = catch_unwind(test).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        if !passed {
            code = ExitCode::FAILURE;
        }
    }
    code
}
