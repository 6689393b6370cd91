//! How errors of a device are told.

use pcibackd::control::protocol::DeviceErrors;
use pcibackd::text::printable;

use super::style::Style;

/// In a few words, and how bad that is; `None` when there were none.
pub fn text(errors: &DeviceErrors) -> Option<(String, Style)> {
    let DeviceErrors {
        correctable,
        non_fatal,
        fatal,
        recovery,
        stopped_dma,
    } = errors;
    let reported = correctable.unwrap_or(0) > 0 || (*non_fatal, *fatal) != (0, 0);
    let stopped = format!("DMA that the IOMMU has stopped: {stopped_dma} times or more");
    match (reported, *stopped_dma > 0) {
        (false, false) => return None,
        (false, true) => return Some((stopped, Style::Notable)),
        _ => {}
    }
    let correctable = correctable.map(|count| format!("{count} correctable, "));
    let mut text = format!(
        "errors: {}{non_fatal} non-fatal, {fatal} fatal",
        correctable.unwrap_or_default()
    );
    if let Some(recovery) = recovery {
        text.push_str(&format!("; the last one: {}", printable(recovery)));
    }
    if *stopped_dma > 0 {
        text.push_str(&format!("; {stopped}"));
    }
    let style = match recovery.as_deref() {
        Some(recovery) if recovery.starts_with("not recovered") => Style::Bad,
        _ => Style::Notable,
    };
    Some((text, style))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_errors_needs_no_words() {
        let none = DeviceErrors {
            correctable: Some(0),
            ..DeviceErrors::default()
        };
        assert!(text(&none).is_none() && text(&DeviceErrors::default()).is_none());
    }

    #[test]
    fn counts_and_the_last_recovery_are_told() {
        let errors = DeviceErrors {
            correctable: Some(7),
            non_fatal: 2,
            fatal: 1,
            recovery: Some("not recovered: its guest did not answer in time".into()),
            stopped_dma: 0,
        };
        let expected = "errors: 7 correctable, 2 non-fatal, 1 fatal; the last one: not recovered: its guest did not answer in time";
        let (text, style) = text(&errors).unwrap();
        assert_eq!(text, expected);
        assert!(matches!(style, Style::Bad));
    }

    #[test]
    fn dma_that_was_stopped_is_told_beside_errors_and_alone() {
        let mut errors = DeviceErrors {
            stopped_dma: 3,
            ..DeviceErrors::default()
        };
        let told = "DMA that the IOMMU has stopped: 3 times or more";
        assert_eq!(text(&errors).unwrap().0, told);
        errors.fatal = 1;
        let expected = format!("errors: 0 non-fatal, 1 fatal; {told}");
        assert_eq!(text(&errors).unwrap().0, expected);
    }
}
