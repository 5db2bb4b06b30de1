//! Order on the inbox: what a seq means against the cursor, gaps, and when to acknowledge.

use crate::ids::Seq;

/// A hole that this device will never see filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Gap {
    /// The first seq that is missing.
    pub from: Seq,
    /// The last one.
    pub to: Seq,
}

/// Whether an item is new: everything up to the cursor was processed, and its transaction committed.
pub fn is_new(cursor: Seq, seq: Seq) -> bool {
    seq > cursor
}

/// The part of a gap that is behind the cursor; `None` if it was told before.
pub fn gap(cursor: Seq, from: Seq, to: Seq) -> Option<Gap> {
    (to > cursor && from <= to).then(|| Gap { from: from.max(Seq(cursor.0 + 1)), to })
}

/// What the server's cursor says when a stream begins. It may be behind ours (an acknowledgement was lost: it sends again, we
/// drop). It is ahead only if this device's state was set back, say by restoring a backup: then messages are missing.
pub fn hello(cursor: Seq, server: Seq) -> Option<Gap> {
    gap(cursor, Seq(cursor.0.saturating_add(1)), server)
}

/// Which acknowledgement to send: only what is committed, only forward, many in one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Acks {
    committed: Seq,
    sent: Seq,
}

impl Acks {
    /// A new stream, whose server has the cursor `server`.
    pub fn new(committed: Seq, server: Seq) -> Self {
        Self { committed, sent: server }
    }

    /// The transaction with everything up to `cursor` is committed.
    pub fn committed(&mut self, cursor: Seq) {
        self.committed = self.committed.max(cursor);
    }

    /// The acknowledgement to send now, if there is news.
    pub fn take(&mut self) -> Option<Seq> {
        (self.committed > self.sent).then(|| {
            self.sent = self.committed;
            self.sent
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_processed_is_old() {
        assert!(is_new(Seq(4), Seq(5)) && !is_new(Seq(5), Seq(5)) && !is_new(Seq(5), Seq(1)));
    }

    #[test]
    fn gaps_are_told_once_and_only_their_new_part() {
        assert_eq!(gap(Seq(10), Seq(3), Seq(10)), None);
        assert_eq!(gap(Seq(10), Seq(3), Seq(12)), Some(Gap { from: Seq(11), to: Seq(12) }));
        assert_eq!(gap(Seq(10), Seq(15), Seq(20)), Some(Gap { from: Seq(15), to: Seq(20) }));
        assert_eq!(gap(Seq(10), Seq(20), Seq(15)), None, "an impossible gap says nothing");
        assert_eq!(gap(Seq::MAX, Seq(1), Seq::MAX), None);
    }

    #[test]
    fn a_server_ahead_of_us_is_a_gap() {
        assert_eq!(hello(Seq(10), Seq(10)), None);
        assert_eq!(hello(Seq(10), Seq(4)), None);
        assert_eq!(hello(Seq(10), Seq(12)), Some(Gap { from: Seq(11), to: Seq(12) }));
    }

    #[test]
    fn acknowledgements_only_move_forward() {
        let mut acks = Acks::new(Seq(7), Seq(5));
        assert_eq!(acks.take(), Some(Seq(7)), "the last one before the crash was lost");
        assert_eq!(acks.take(), None);
        acks.committed(Seq(6));
        assert_eq!(acks.take(), None);
        acks.committed(Seq(8));
        acks.committed(Seq(9));
        assert_eq!((acks.take(), acks.take()), (Some(Seq(9)), None));
    }
}
