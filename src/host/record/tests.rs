//! Records, written and read again.

use std::num::NonZeroU32;

use conf_space::overlay::{Permissive, Quirks, Ranges};

use super::*;
use crate::config::{AerSetting, OnFailure, ResetChoice};

fn bdf() -> Bdf {
    "0000:03:00.1".parse().unwrap()
}

#[test]
fn what_was_written_is_there_when_the_record_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let owner = Owner {
        domain: DomId(7),
        seen_as: "0001:02:1f.3".parse().unwrap(),
    };
    {
        let record = Record::open(dir.path(), bdf()).unwrap();
        assert_eq!(record.phase(), None);
        record.set_driver(Some("e1000e"));
        record.set_config(&[1, 2, 3]);
        record.set_owner(owner);
        record.set_overlay(u64::MAX - 5);
        record.insert(Flags::ENABLED | Flags::QUARANTINED);
        record.clear(Flags::QUARANTINED);
        record.count_reset();
        record.count_reset();
        record.set_phase(Phase::Assigned);
    }
    let record = Record::open(dir.path(), bdf()).unwrap();
    assert_eq!(record.phase(), Some(Phase::Assigned));
    assert_eq!(record.driver().as_deref(), Some("e1000e"));
    assert_eq!(record.config(), [1, 2, 3]);
    assert_eq!(record.owner(), Some(owner));
    assert_eq!(record.overlay(), u64::MAX - 5);
    assert_eq!(record.resets(), 2);
    assert_eq!(record.flags(), Flags::ENABLED | Flags::SAVED);
    assert_eq!(Record::list(dir.path()).unwrap(), [bdf()]);
    record.remove().unwrap();
    assert!(Record::list(dir.path()).unwrap().is_empty());
}

#[test]
fn only_one_of_two_claimants_wins() {
    let dir = tempfile::tempdir().unwrap();
    let record = Record::open(dir.path(), bdf()).unwrap();
    record.set_phase(Phase::Hidden);
    assert!(record.advance(Phase::Hidden, Phase::Assigned));
    assert!(!record.advance(Phase::Hidden, Phase::Assigned));
}

#[test]
fn a_file_of_another_kind_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(bdf().to_string());
    for content in [vec![1; 10], vec![0xff; size_of::<Layout>()]] {
        fs::write(&path, &content).unwrap();
        assert!(matches!(
            Record::open(dir.path(), bdf()),
            Err(RecordError::Foreign { .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), content);
    }
}

fn settings() -> RunTime {
    let mut ranges = Ranges::EMPTY;
    ranges.insert("0xe8..0xea".parse().unwrap()).unwrap();
    ranges.insert("0x40..0x48".parse().unwrap()).unwrap();
    let mut quirks = Quirks::EMPTY;
    quirks.insert("c8:2:00ff".parse().unwrap()).unwrap();
    quirks.insert("100:4:80000000".parse().unwrap()).unwrap();
    RunTime {
        permissive: Some(Permissive::Ranges(ranges)),
        quirks,
        allow_interrupt_control: Some(false),
        allow_shared_interrupt: Some(true),
        allow_shared_pages: Some(false),
        reset: Some(ResetChoice::Pm),
        aer: AerSetting {
            on_failure: Some(OnFailure::Kill),
            timeout: NonZeroU32::new(u32::MAX),
            mmio_enabled: Some(true),
        },
        irq_handler: true,
        meant_for: Some(DomId(0)),
    }
}

#[test]
fn what_is_set_at_run_time_is_there_when_the_record_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut others = vec![RunTime::default(), settings()];
    others.extend([Permissive::No, Permissive::Yes].map(|permissive| RunTime {
        permissive: Some(permissive),
        allow_interrupt_control: Some(true),
        ..RunTime::default()
    }));
    others.extend([ResetChoice::Auto, ResetChoice::None].map(|reset| RunTime {
        reset: Some(reset),
        ..settings()
    }));
    for other in others {
        Record::open(dir.path(), bdf())
            .unwrap()
            .update_settings(|settings| *settings = other);
        let record = Record::open(dir.path(), bdf()).unwrap();
        record.recover_settings();
        assert_eq!(record.settings(), other);
    }
}

#[test]
fn a_change_that_fails_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let record = Record::open(dir.path(), bdf()).unwrap();
    let version = record.settings_version();
    let failed = record.change_settings(|changed| {
        *changed = settings();
        Err("no")
    });
    assert_eq!(failed, Err("no"));
    assert_eq!(record.settings(), RunTime::default());
    assert_eq!(record.settings_version(), version);
}

#[test]
fn settings_that_were_written_half_when_the_daemon_was_killed_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let record = Record::open(dir.path(), bdf()).unwrap();
    record.update_settings(|changed| *changed = settings());
    record.layout().settings.begin();
    assert_eq!(record.try_settings(), None);
    let record = Record::open(dir.path(), bdf()).unwrap();
    record.recover_settings();
    assert_eq!(record.settings(), RunTime::default());
    assert!(record.try_settings().is_some());
}

/// Whoever looks while another thread changes the settings sees those from before or from after, never a mixture.
#[test]
fn settings_are_never_seen_half_changed() {
    let dir = tempfile::tempdir().unwrap();
    let record = Record::open(dir.path(), bdf()).unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for turn in 0..2000 {
                let next = if turn % 2 == 0 {
                    settings()
                } else {
                    RunTime::default()
                };
                record.update_settings(|changed| *changed = next);
            }
        });
        while !writer.is_finished() {
            if let Some((_, seen)) = record.try_settings() {
                assert!(seen == settings() || seen == RunTime::default());
            }
        }
    });
}
