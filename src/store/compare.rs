//! Whether a row says the same in two views of one log, which are never at the same position while events flow.
//!
//! A view whose position is `M` holds of each inbox and mark everything before `M`, and each of them says itself what it holds beyond that
//! (`applied`). So two rows that hold nothing at or beyond the lower position of the two views must be equal, as must two that hold exactly the
//! same; anything else is looked at again later. Where the log's first records were removed by retention, a view made anew can't
//! know what only they said.

use crate::ids::Seq;
use crate::store::{InboxState, Mark};

/// What two rows say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The same.
    Equal,
    /// Not the same, and nothing explains it yet.
    Differs,
    /// One view is further than the other: ask again.
    Later,
    /// They differ by what only removed records said.
    Forgotten,
}

/// What both views must hold (before `bound`), and where the log begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The position of the view that is behind, as a seq.
    pub bound: Seq,
    /// The log's first record, as a seq; `None` if all records are there.
    pub begins: Option<Seq>,
}

/// A row of either kind.
pub trait Row: Copy + PartialEq {
    /// The last event that it holds.
    fn applied(&self) -> Seq;
    /// What of it does not come from records before this one; rows that are equal by that differ in what was forgotten.
    fn without(self, begins: Seq) -> Self;
}

impl Row for InboxState {
    fn applied(&self) -> Seq {
        self.applied
    }

    fn without(self, begins: Seq) -> Self {
        let kept = |seq: Seq| if seq < begins { Seq::ZERO } else { seq };
        // What expired is older than the log, and a stream that was opened before it began ends with the next restart of its edge.
        Self {
            cursor: kept(self.cursor),
            expired_to: kept(self.expired_to),
            last: kept(self.last),
            applied: kept(self.applied),
            attached: None,
            items: 0,
            bytes: 0,
        }
    }
}

impl Row for Mark {
    fn applied(&self) -> Seq {
        self.applied
    }

    fn without(self, begins: Seq) -> Self {
        if self.applied < begins { Self::default() } else { Self { seen: 0, ..self } }
    }
}

/// The verdict on a row of both views; `None`: it is not there.
pub fn rows<R: Row>(one: Option<R>, other: Option<R>, range: Range) -> Verdict {
    if one == other {
        return Verdict::Equal;
    }
    let applied = |row: &Option<R>| row.as_ref().map_or(Seq::ZERO, Row::applied);
    let beyond = applied(&one).max(applied(&other)) >= range.bound;
    if beyond && applied(&one) != applied(&other) {
        return Verdict::Later;
    }
    match range.begins {
        Some(begins) if without(one, begins) == without(other, begins) => Verdict::Forgotten,
        _ => Verdict::Differs,
    }
}

/// A row that only forgotten records speak of is as good as none.
fn without<R: Row>(row: Option<R>, begins: Seq) -> Option<R> {
    row.filter(|row| row.applied() >= begins).map(|row| row.without(begins))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Range = Range { bound: Seq(100), begins: None };
    const TRIMMED: Range = Range { bound: Seq(100), begins: Some(Seq(50)) };

    fn inbox(applied: u64, cursor: u64, items: u64) -> Option<InboxState> {
        Some(InboxState { applied: Seq(applied), cursor: Seq(cursor), items, ..InboxState::default() })
    }

    #[test]
    fn what_both_hold_must_be_equal() {
        assert_eq!(rows(inbox(99, 1, 2), inbox(99, 1, 2), WHOLE), Verdict::Equal);
        assert_eq!(rows(inbox(99, 1, 2), inbox(99, 1, 3), WHOLE), Verdict::Differs);
        assert_eq!(rows(inbox(99, 1, 2), inbox(90, 1, 2), WHOLE), Verdict::Differs);
        assert_eq!(rows(inbox(99, 1, 2), None, WHOLE), Verdict::Differs);
        assert_eq!(rows(None, inbox(5, 1, 2), WHOLE), Verdict::Differs);
        assert_eq!(rows::<InboxState>(None, None, WHOLE), Verdict::Equal);
    }

    #[test]
    fn what_only_one_can_hold_is_asked_again() {
        assert_eq!(rows(inbox(100, 1, 2), inbox(99, 1, 2), WHOLE), Verdict::Later);
        assert_eq!(rows(inbox(99, 1, 2), inbox(100, 1, 2), WHOLE), Verdict::Later);
        assert_eq!(rows(None, inbox(100, 1, 2), WHOLE), Verdict::Later);
        // Both hold the same events beyond the bound.
        assert_eq!(rows(inbox(120, 1, 2), inbox(120, 1, 3), WHOLE), Verdict::Differs);
    }

    #[test]
    fn what_the_log_forgot_is_told_apart() {
        assert_eq!(rows(inbox(49, 1, 2), None, TRIMMED), Verdict::Forgotten);
        assert_eq!(rows(inbox(50, 1, 2), None, TRIMMED), Verdict::Differs);
        assert_eq!(rows(inbox(99, 49, 2), inbox(99, 0, 2), TRIMMED), Verdict::Forgotten);
        assert_eq!(rows(inbox(99, 50, 2), inbox(99, 0, 2), TRIMMED), Verdict::Differs);
        let mark = |high, seen, applied| Some(Mark { high, seen, applied: Seq(applied) });
        assert_eq!(rows(mark(9, 3, 60), mark(9, 1, 60), TRIMMED), Verdict::Forgotten);
        assert_eq!(rows(mark(9, 3, 60), mark(9, 1, 60), WHOLE), Verdict::Differs);
        assert_eq!(rows(mark(9, 3, 60), mark(8, 1, 60), TRIMMED), Verdict::Differs);
    }
}
