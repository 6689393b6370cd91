//! Watch events that wait to be taken.

use std::collections::VecDeque;

/// A watched node, or one below it, has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// The node that changed. The watched path itself means that anything at or below it may have
    /// changed.
    pub path: String,
    /// The watch's token.
    pub token: String,
}

/// Events in the order of arrival, each path and token once, and never more than a fixed number
/// plus one for each watch.
#[derive(Debug)]
pub(super) struct EventQueue {
    waiting: VecDeque<WatchEvent>,
    watches: Vec<WatchEvent>,
    limit: usize,
}

impl EventQueue {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            watches: Vec::new(),
            limit,
        }
    }

    /// Remembers a watch, for what [`EventQueue::push`] does when the queue is full. False if it is
    /// known already.
    pub(super) fn add_watch(&mut self, path: &str, token: &str) -> bool {
        let watch = WatchEvent {
            path: path.to_owned(),
            token: token.to_owned(),
        };
        let new = !self.watches.contains(&watch);
        if new {
            self.watches.push(watch);
        }
        new
    }

    /// Forgets a watch, and its events unless another watch has the same token.
    pub(super) fn remove_watch(&mut self, path: &str, token: &str) {
        self.watches
            .retain(|watch| watch.path != path || watch.token != token);
        if !self.watches.iter().any(|watch| watch.token == token) {
            self.waiting.retain(|event| event.token != token);
        }
    }

    /// Adds an event. When the queue is full, an event for the watched path itself stands for it,
    /// so that a storm costs no memory and still nothing is missed.
    pub(super) fn push(&mut self, event: WatchEvent) {
        if self.waiting.contains(&event) {
            return;
        }
        if self.waiting.len() < self.limit {
            self.waiting.push_back(event);
            return;
        }
        for watch in self
            .watches
            .iter()
            .filter(|watch| watch.token == event.token)
        {
            if !self.waiting.contains(watch) {
                self.waiting.push_back(watch.clone());
            }
        }
    }

    pub(super) fn pop(&mut self) -> Option<WatchEvent> {
        self.waiting.pop_front()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
