//! The backend's state machine: what to do next, from what both ends show. Pure.
//!
//! It looks at the states as they are, not at what has just changed: events may be lost, merged or invented by a guest, and after a
//! restart there are none to remember. Writing a state makes the next look come to another step, until there is nothing to do.

use std::time::Duration;

use xenbus::XenbusState::{
    self, Closed, Closing, Connected, InitWait, Initialised, Initialising, Reconfigured,
    Reconfiguring, Unknown,
};

/// A frontend that has not begun, or has closed in order, gets this long; then the toolstack is not kept waiting for it. Long enough for one
/// that closes in order to see that the backend has followed to 6, without which it does not go on (Mini-OS; Linux's
/// `xenbus_reset_frontend`, in the kernel that kexec starts).
const ABSENT_AFTER: Duration = Duration::from_millis(300);

/// The same for one that is closing: it waits for the backend's 5.
const STUCK_AFTER: Duration = Duration::from_secs(2);

/// How often a guest is looked at that was paused.
const PAUSED_LOOK: Duration = Duration::from_secs(1);

/// Longer than the toolstack waits for the guest to let a device go (libxl: 10 s).
const UNANSWERED_AFTER: Duration = Duration::from_secs(12);

/// What both ends show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Our state node. The toolstack writes it too: 1 at creation, 7 when devices come or go, 5 when it forces us out.
    pub backend: XenbusState,
    /// The frontend's state node.
    pub frontend: XenbusState,
    /// The toolstack's `online` node: the device is to stay although the frontend closes.
    pub online: bool,
    /// How long the backend has shown its state, and the frontend its own.
    pub since: (Duration, Duration),
    /// Who is on the other side.
    pub peer: Peer,
    /// The page is mapped and the event channel bound.
    pub linked: bool,
}

/// Who is on the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A PV guest, which runs a frontend.
    Frontend,
    /// A PV guest that will run one, and is waited for: it is being built, was paused, or is a stub domain, whose frontend the toolstack needs
    /// before it goes on.
    Expected,
    /// Nobody who speaks to us: an HVM guest, whose devices QEMU hands it, or a guest that has stopped running.
    Nobody,
    /// Not even a domain.
    Gone,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing, until something changes. New devices that the toolstack adds one by one are still taken in.
    Wait,
    /// Show this state.
    Show(XenbusState),
    /// Export the devices and publish the roots, then show this state.
    Export(XenbusState),
    /// Map the page and bind the event channel that the frontend offers, then show Connected.
    Connect,
    /// The same after a restart of the daemon: no state changes.
    Relink,
    /// Unmap the page and close the event channel, then show this state.
    Disconnect(XenbusState),
    /// Take in and let go the devices that the toolstack marked, then show this state.
    Reconfigure(XenbusState),
    /// Let go of everything and show Closed.
    Release,
    /// Our nodes, or the domain, are gone: let go of everything, remove what is left of our nodes, and end.
    End,
}

/// The step that `view` calls for.
pub fn next(view: View) -> Step {
    match view {
        View {
            backend: Unknown, ..
        }
        | View {
            peer: Peer::Gone, ..
        } => Step::End,
        // Forced out by the toolstack.
        View {
            backend: Closing,
            online: false,
            ..
        } => Step::Release,
        View {
            peer: Peer::Nobody, ..
        } => without_frontend(view),
        _ if hurried(view) || is_absent(view) => without_frontend(view),
        _ => with_frontend(view),
    }
}

/// Whether the frontend went to 6 without waiting for the backend's 5, as xen-pcifront does when it is unbound. It waits for no 6 either;
/// and when it is bound again at once, it takes a 6 that it finds for the backend's end, and closes for good.
fn hurried(view: View) -> bool {
    let waits_for_us = matches!(view.backend, Closing | Closed);
    view.frontend == Closed && !waits_for_us && view.online
}

/// Whether the guest runs no frontend: its driver is not loaded, not yet or not any more.
fn is_absent(view: View) -> bool {
    view.peer == Peer::Frontend
        && view.online
        && absent_after(view.frontend).is_some_and(|time| view.since.1 >= time)
}

fn absent_after(frontend: XenbusState) -> Option<Duration> {
    match frontend {
        Initialising | Closed => Some(ABSENT_AFTER),
        Closing => Some(STUCK_AFTER),
        _ => None,
    }
}

/// Whether devices may have been added without state 7: the toolstack adds them one by one while it builds the guest.
pub fn adds_silently(view: View) -> bool {
    let before = view.backend == Initialised || view.backend == Connected && !view.linked;
    before && view.peer != Peer::Gone
}

/// Whether the toolstack has given up waiting for the guest to let devices go.
pub fn is_unanswered(view: View) -> bool {
    waits_for_answer(view) && view.since.0 >= UNANSWERED_AFTER
}

fn waits_for_answer(view: View) -> bool {
    view.backend == Reconfiguring && view.frontend != Reconfiguring && view.linked
}

/// How long until another step may be due although nothing changes.
pub fn patience(view: View) -> Option<Duration> {
    let left = |after: Duration, since| after.checked_sub(since).filter(|left| !left.is_zero());
    if waits_for_answer(view) {
        return left(UNANSWERED_AFTER, view.since.0);
    }
    let after = absent_after(view.frontend)?;
    match view.peer {
        Peer::Frontend => left(after, view.since.1),
        // Nothing tells when it is let run.
        Peer::Expected => Some(PAUSED_LOOK),
        Peer::Nobody | Peer::Gone => None,
    }
}

/// Nobody will answer us, so nothing is waited for. The toolstack waits for Connected before it adds or takes a device: it shall see it.
fn without_frontend(view: View) -> Step {
    if view.linked {
        return Step::Disconnect(view.backend);
    }
    match view.backend {
        Initialising | InitWait | Initialised => Step::Export(Connected),
        Reconfiguring => Step::Reconfigure(Connected),
        Closed if !view.online => Step::Wait,
        Connected => Step::Wait,
        Closing | Closed | Reconfigured | Unknown => Step::Show(Connected),
    }
}

fn with_frontend(view: View) -> Step {
    match (view.frontend, view.backend) {
        (Unknown, Closed) => Step::Wait,
        (Unknown, _) => Step::Release,

        // The toolstack takes devices away, and the frontend will not answer any more: done without it.
        (Closing, Reconfiguring) if view.linked => Step::Disconnect(Reconfiguring),
        (Closing, Reconfiguring) => Step::Reconfigure(Closing),

        (Closing, Closing | Closed) if !view.linked => Step::Wait,
        (Closing, _) => Step::Disconnect(Closing),
        (Closed, Closed) if !view.linked => Step::Wait,
        (Closed, _) if !view.online => Step::Release,
        (Closed, _) => Step::Disconnect(Closed),

        (_, Initialising) => Step::Show(InitWait),
        (_, InitWait) => Step::Export(Initialised),
        (Initialised, Initialised) => Step::Connect,

        // A frontend that was closed comes back: the guest has loaded its driver anew, or another kernel (kexec).
        (Initialising | InitWait, Closed) if view.online => Step::Show(InitWait),
        (Initialised, Closed) if view.online => Step::Show(Initialised),
        // The same, of one whose closing was not seen: it hurried, or there was no daemon.
        (Initialising, Connected | Closing | Reconfiguring | Reconfigured) => {
            Step::Disconnect(InitWait)
        }

        (Initialised | Connected | Reconfiguring, Connected | Reconfiguring | Reconfigured)
            if !view.linked =>
        {
            Step::Relink
        }

        (Reconfiguring, Reconfiguring) => Step::Reconfigure(Reconfigured),
        (Connected, Reconfigured) => Step::Show(Connected),
        // It was loaded while devices came or went, which was then done without it: it looks for devices when it sees 8.
        (Reconfiguring, Connected) => Step::Show(Reconfigured),

        _ => Step::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [XenbusState; 9] = [
        Unknown,
        Initialising,
        InitWait,
        Initialised,
        Connected,
        Closing,
        Closed,
        Reconfiguring,
        Reconfigured,
    ];

    fn view(backend: XenbusState, frontend: XenbusState) -> View {
        View {
            backend,
            frontend,
            online: true,
            since: (Duration::ZERO, Duration::ZERO),
            peer: Peer::Frontend,
            linked: false,
        }
    }

    /// Follows the steps as the session does, until there is nothing to do; the states shown on the way.
    fn run(mut view: View) -> (Vec<Step>, View) {
        let mut steps = Vec::new();
        loop {
            let step = next(view);
            match step {
                Step::Wait => return (steps, view),
                Step::Show(state) | Step::Export(state) | Step::Reconfigure(state) => {
                    view.backend = state
                }
                Step::Connect => (view.linked, view.backend) = (true, Connected),
                Step::Relink => view.linked = true,
                Step::Disconnect(state) => (view.linked, view.backend) = (false, state),
                Step::Release => (view.linked, view.backend) = (false, Closed),
                Step::End => {
                    steps.push(step);
                    return (steps, view);
                }
            }
            steps.push(step);
            assert!(steps.len() < 8, "{view:?} does not come to rest: {steps:?}");
        }
    }

    #[test]
    fn a_guest_boots_up_to_connected() {
        let (steps, end) = run(view(Initialising, Initialising));
        assert_eq!(steps, [Step::Show(InitWait), Step::Export(Initialised)]);
        let (steps, end) = run(View {
            frontend: Initialised,
            ..end
        });
        assert_eq!(steps, [Step::Connect]);
        assert_eq!(end.backend, Connected);
    }

    #[test]
    fn a_frontend_that_was_faster_is_connected_all_the_same() {
        let (steps, _) = run(view(Initialising, Initialised));
        assert_eq!(
            steps,
            [
                Step::Show(InitWait),
                Step::Export(Initialised),
                Step::Connect
            ]
        );
    }

    #[test]
    fn hot_plug_goes_by_7_and_8_back_to_4() {
        let linked = View {
            linked: true,
            ..view(Reconfiguring, Connected)
        };
        assert_eq!(next(linked), Step::Wait);
        assert_eq!(
            next(View {
                frontend: Reconfiguring,
                ..linked
            }),
            Step::Reconfigure(Reconfigured)
        );
        let shown = View {
            backend: Reconfigured,
            ..linked
        };
        assert_eq!(
            next(View {
                frontend: Reconfiguring,
                ..shown
            }),
            Step::Wait
        );
        assert_eq!(next(shown), Step::Show(Connected));
    }

    #[test]
    fn a_driver_that_is_loaded_anew_connects_again() {
        let closing = View {
            linked: true,
            ..view(Connected, Closing)
        };
        let (steps, end) = run(closing);
        assert_eq!(steps, [Step::Disconnect(Closing)]);
        let (steps, end) = run(View {
            frontend: Closed,
            ..end
        });
        assert_eq!(steps, [Step::Disconnect(Closed)]);
        let (steps, end) = run(View {
            frontend: Initialised,
            ..end
        });
        assert_eq!(steps, [Step::Show(Initialised), Step::Connect]);
        assert_eq!(end.backend, Connected);
    }

    #[test]
    fn a_driver_that_went_in_a_hurry_leaves_a_backend_that_the_next_one_can_connect_to() {
        for backend in ALL.into_iter().filter(|state| *state != Unknown) {
            for peer in [Peer::Frontend, Peer::Expected] {
                for linked in [false, true] {
                    let (steps, end) = run(View {
                        linked,
                        peer,
                        ..view(backend, Closed)
                    });
                    // Those that wait for it are shown 6 for a while.
                    let in_order = matches!(backend, Closing | Closed);
                    let expected = if in_order { Closed } else { Connected };
                    assert_eq!(end.backend, expected, "{backend}: {steps:?}");
                    assert!(in_order || !steps.contains(&Step::Show(Closed)));
                    assert!(!end.linked);
                }
            }
        }
    }

    #[test]
    fn a_frontend_that_answers_what_was_done_without_it_is_told_to_look_for_devices() {
        let (steps, end) = run(view(Connected, Reconfiguring));
        assert_eq!(steps, [Step::Relink, Step::Show(Reconfigured)]);
        let (_, end) = run(View {
            frontend: Connected,
            ..end
        });
        assert_eq!((end.backend, end.linked), (Connected, true));
    }

    #[test]
    fn a_kexec_that_resets_the_frontend_is_shown_2_as_it_waits_for() {
        let (_, end) = run(view(Closed, Initialising));
        assert_eq!(end.backend, Initialised);
        assert_eq!(next(view(Closed, Initialising)), Step::Show(InitWait));
    }

    #[test]
    fn a_frontend_that_starts_anew_is_ready_to_be_connected_whatever_was_missed_of_its_closing() {
        for backend in ALL {
            for linked in [false, true] {
                let (_, end) = run(View {
                    linked,
                    ..view(backend, Initialising)
                });
                if backend == Unknown {
                    continue;
                }
                assert_eq!(end.backend, Initialised, "{backend}");
            }
        }
    }

    #[test]
    fn closing_for_good_releases() {
        let (steps, end) = run(View {
            online: false,
            linked: true,
            ..view(Connected, Closed)
        });
        assert_eq!(steps, [Step::Release]);
        assert_eq!(end.backend, Closed);
    }

    #[test]
    fn a_restarted_daemon_links_again_without_showing_anything() {
        for backend in [Connected, Reconfiguring, Reconfigured] {
            for frontend in [Initialised, Connected, Reconfiguring] {
                assert_eq!(next(view(backend, frontend)), Step::Relink);
            }
        }
    }

    #[test]
    fn a_toolstack_that_takes_devices_from_a_stopped_guest_never_waits() {
        for backend in ALL {
            let (_, end) = run(View {
                peer: Peer::Nobody,
                ..view(backend, Closed)
            });
            if backend != Unknown {
                assert_eq!(end.backend, Connected);
                let (steps, end) = run(View {
                    backend: Reconfiguring,
                    ..end
                });
                assert_eq!(
                    (steps, end.backend),
                    (vec![Step::Reconfigure(Connected)], Connected)
                );
            }
        }
    }

    #[test]
    fn whatever_both_ends_show_it_comes_to_rest() {
        for backend in ALL {
            for frontend in ALL {
                for peer in [Peer::Frontend, Peer::Expected, Peer::Nobody, Peer::Gone] {
                    for (online, linked) in
                        [(false, false), (false, true), (true, false), (true, true)]
                    {
                        for time in [Duration::ZERO, Duration::MAX] {
                            run(View {
                                backend,
                                frontend,
                                online,
                                since: (time, time),
                                peer,
                                linked,
                            });
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_toolstack_does_not_wait_for_a_guest_that_runs_no_frontend() {
        for frontend in [Initialising, Closing, Closed] {
            for backend in [Initialising, InitWait, Initialised, Closing, Closed] {
                let view = View {
                    since: (Duration::ZERO, STUCK_AFTER),
                    ..view(backend, frontend)
                };
                let (_, end) = run(view);
                assert_eq!(end.backend, Connected, "{view:?}");
                let (steps, _) = run(View {
                    backend: Reconfiguring,
                    ..end
                });
                assert_eq!(steps, [Step::Reconfigure(Connected)]);
                // It may still come.
                let (steps, end) = run(View {
                    frontend: Initialised,
                    since: (ABSENT_AFTER, Duration::ZERO),
                    ..end
                });
                assert_eq!(steps, [Step::Relink]);
                assert_eq!(end.backend, Connected);
            }
        }
    }

    #[test]
    fn a_guest_that_is_being_built_has_all_the_time() {
        let building = View {
            since: (Duration::MAX, Duration::MAX),
            peer: Peer::Expected,
            ..view(Initialised, Initialising)
        };
        assert_eq!(next(building), Step::Wait);
        assert_eq!(patience(building), Some(PAUSED_LOOK));
    }

    #[test]
    fn what_only_time_changes_is_looked_at_in_time() {
        let asked = View {
            linked: true,
            ..view(Reconfiguring, Connected)
        };
        assert_eq!(patience(asked), Some(UNANSWERED_AFTER));
        assert!(!is_unanswered(asked));
        let late = View {
            since: (UNANSWERED_AFTER, Duration::ZERO),
            ..asked
        };
        assert!(is_unanswered(late));
        assert_eq!(patience(late), None);
        assert_eq!(patience(view(Closed, Closed)), Some(ABSENT_AFTER));
        assert_eq!(patience(view(Connected, Connected)), None);
    }

    #[test]
    fn without_nodes_or_domain_the_session_ends() {
        assert_eq!(next(view(Unknown, Connected)), Step::End);
        assert_eq!(
            next(View {
                peer: Peer::Gone,
                ..view(Connected, Connected)
            }),
            Step::End
        );
    }
}
