//! Durations, as persons read them.

/// Some nanoseconds with two or three digits, rounded down to tenths of their unit.
pub fn short(nanoseconds: u64) -> String {
    let (tenths, unit) = match nanoseconds {
        0..1_000 => return format!("{nanoseconds} ns"),
        1_000..1_000_000 => (nanoseconds / 100, "µs"),
        1_000_000..1_000_000_000 => (nanoseconds / 100_000, "ms"),
        _ => (nanoseconds / 100_000_000, "s"),
    };
    if tenths >= 1000 {
        format!("{} {unit}", tenths / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

/// For how long something has been there: its two largest units.
pub fn uptime(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_time_is_told_in_the_largest_unit_that_fits() {
        for (nanoseconds, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1000, "1.0 µs"),
            (4096, "4.0 µs"),
            (131_072, "131 µs"),
            (1_048_576, "1.0 ms"),
            (12_340_000_000, "12.3 s"),
        ] {
            assert_eq!(short(nanoseconds), text);
        }
    }

    #[test]
    fn a_long_time_is_told_in_two_units() {
        for (seconds, text) in [
            (59, "59 s"),
            (61, "1 min 1 s"),
            (3_600, "1 h 0 min"),
            (200_000, "2 d 7 h"),
        ] {
            assert_eq!(uptime(seconds), text);
        }
    }
}
