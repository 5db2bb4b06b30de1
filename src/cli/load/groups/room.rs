//! A group of a run, and all that anybody had of it.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::ops::Op;
use super::reading::{Kind, Shared, Tree};
use super::seat::Seat;
use crate::cli::load::wire::Item;
use crate::ids::GroupId;

/// Kinds of items, as `stream.proto` numbers them.
pub const COMMIT: u32 = 2;
pub const MESSAGE: u32 = 4;

/// A group of the run.
pub struct Room {
    pub id: GroupId,
    pub epoch: Cell<u64>,
    /// Its seat of the member that is taken out and comes back, if that is online.
    pub guest: Option<usize>,
    /// When the last of those who are online had its invitation.
    pub complete_us: Cell<u64>,
    /// When each of a sender's messages was sent, by its account and number.
    pub sent_at: RefCell<HashMap<([u8; 16], u64), u64>>,
    /// What the commit that ended each epoch does, and when it was submitted.
    pub commits: RefCell<HashMap<u64, (Op, u64)>>,
    /// The epochs that end with the guest's removal.
    pub removals: RefCell<HashSet<u64>>,
    /// All that anybody had, by position.
    pub items: RefCell<Vec<Arc<Shared>>>,
    pub trees: RefCell<HashMap<u64, Tree>>,
    pub accepted: Cell<u64>,
}

impl Room {
    pub fn new(id: GroupId, guest: Option<usize>) -> Self {
        Self {
            id,
            epoch: Cell::default(),
            guest,
            complete_us: Cell::default(),
            sent_at: RefCell::default(),
            commits: RefCell::default(),
            removals: RefCell::default(),
            items: RefCell::default(),
            trees: RefCell::default(),
            accepted: Cell::default(),
        }
    }

    /// Where the item stands in `items`; `None` if what is there under its position is another one.
    pub fn shared(&self, item: &Item<'_>) -> Option<Arc<Shared>> {
        let mut items = self.items.borrow_mut();
        let at = match items.last() {
            Some(last) if last.seq >= item.seq => items.partition_point(|one| one.seq < item.seq),
            _ => items.len(),
        };
        let kind = match item.kind {
            COMMIT => Kind::Commit,
            MESSAGE => Kind::Message,
            _ => Kind::Other,
        };
        if let Some(known) = items.get(at).filter(|known| known.seq == item.seq) {
            let same =
                (known.kind, known.epoch) == (kind, item.epoch) && known.account == item.sender_account && known.content == item.content;
            return same.then(|| Arc::clone(known));
        }
        let (account, content) = (item.sender_account.to_vec(), item.content.to_vec());
        let shared = Arc::new(Shared { seq: item.seq, kind, epoch: item.epoch, account, content });
        items.insert(at, Arc::clone(&shared));
        Some(shared)
    }

    /// How much of what others had, and of what was accepted, these members did not have, if the group ends at `head`.
    pub fn lost<'s>(&self, seats: impl Iterator<Item = &'s Seat>, head: u64) -> u64 {
        let items = self.items.borrow();
        let upto = |seq: u64| items.partition_point(|item| item.seq <= seq) as u64;
        let messages = items.iter().filter(|item| item.kind == Kind::Message).count() as u64;
        let nobody_had = self.accepted.get().saturating_sub(messages);
        let lost = seats.map(|seat| {
            let feed = seat.feed.borrow();
            let due: u64 = feed.spans.iter().map(|span| upto(span.to.unwrap_or(head)).saturating_sub(upto(span.from))).sum();
            due.saturating_sub(feed.had).max(u64::from(feed.behind(head))) + nobody_had
        });
        lost.sum()
    }
}
