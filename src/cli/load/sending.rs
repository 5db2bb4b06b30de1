//! What one device has sent: numbers from 1, each answered once in the end. No I/O here.

use std::collections::{BTreeMap, VecDeque};

use super::engine::World;

/// The shortest pause before a refused send is repeated.
const REPEAT_US: u64 = 5_000;

/// Codes of `SendResult` that a client answers by sending again with the same id.
const REPEATABLE: [u32; 4] = [9, 10, 11, 16];

/// What became of one number.
#[derive(Clone)]
pub enum Slot {
    /// Sent and not answered.
    Waiting {
        /// When it was sent first, or was due.
        at_us: u64,
        /// Type and ciphertext, if they can't be made again.
        content: Option<(u8, Vec<u8>)>,
    },
    /// Answered for good.
    Done,
}

/// What an answer made of a send.
pub enum Answered {
    /// It is durable.
    Accepted {
        /// When it was sent first, or was due.
        at_us: u64,
    },
    /// For good.
    Refused,
    /// To be repeated, or known already.
    Open,
}

/// The sending half: numbers from 1, each answered once in the end.
pub struct Sending {
    quota: u64,
    next: u64,
    /// Number of the first slot.
    base: u64,
    slots: VecDeque<Slot>,
    /// Without an answer.
    waiting: u64,
    /// Begun, and neither received by the recipient nor refused.
    in_flight: u64,
    repeat: VecDeque<u64>,
    later: Vec<(u64, u64)>,
    /// Refusals that no repeat can help, by code.
    pub refused: BTreeMap<u32, u64>,
    /// Sends that were repeated.
    pub repeats: u64,
    /// The longest that one took from when it was due until it was accepted.
    pub slowest_us: u64,
}

impl Sending {
    /// With this many messages to send at most.
    pub fn new(quota: u64) -> Self {
        Self {
            quota,
            next: 1,
            base: 1,
            slots: VecDeque::new(),
            waiting: 0,
            in_flight: 0,
            repeat: VecDeque::new(),
            later: Vec::new(),
            refused: BTreeMap::new(),
            repeats: 0,
            slowest_us: 0,
        }
    }

    /// Messages begun so far.
    pub fn begun(&self) -> u64 {
        self.next - 1
    }

    /// Sends without an answer.
    pub fn waiting(&self) -> u64 {
        self.waiting
    }

    /// Whether all that will be sent was answered.
    pub fn finished(&self) -> bool {
        self.waiting == 0
    }

    /// Whether the quota is used up.
    pub fn exhausted(&self) -> bool {
        self.begun() >= self.quota
    }

    /// The number that goes out next.
    pub const fn next(&self) -> u64 {
        self.next
    }

    /// Whether something waits for its time to go again.
    pub fn has_later(&self) -> bool {
        !self.later.is_empty()
    }

    /// A number that is due to go again.
    pub fn next_repeat(&mut self) -> Option<u64> {
        self.repeat.pop_front()
    }

    /// Whether window and quota leave room for the next number; the caller decides whether its time has come.
    pub fn room(&self, world: &World) -> bool {
        let open = if world.until_delivered { self.waiting.max(self.in_flight) } else { self.waiting };
        open < world.window && self.begun() < self.quota && self.next - self.base <= world.routes.spread_max()
    }

    /// The next number goes out.
    pub fn begin(&mut self, at_us: u64, content: Option<(u8, Vec<u8>)>) {
        self.slots.push_back(Slot::Waiting { at_us, content });
        self.next += 1;
        self.waiting += 1;
        self.in_flight += 1;
    }

    /// What is known of a number; `None` once it was answered, with all before it.
    pub fn slot(&mut self, number: u64) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(number.checked_sub(self.base)?).ok()?)
    }

    /// An answer came.
    pub fn answered(&mut self, number: u64, code: u32, retry_after_ms: u32, now_us: u64) -> Answered {
        let Some(&mut Slot::Waiting { at_us, .. }) = self.slot(number) else { return Answered::Open };
        if REPEATABLE.contains(&code) {
            self.later.push((now_us + REPEAT_US.max(u64::from(retry_after_ms) * 1_000), number));
            return Answered::Open;
        }
        if let Some(slot) = self.slot(number) {
            *slot = Slot::Done;
        }
        self.waiting -= 1;
        while matches!(self.slots.front(), Some(Slot::Done)) {
            self.slots.pop_front();
            self.base += 1;
        }
        if code == 0 {
            self.slowest_us = self.slowest_us.max(now_us.saturating_sub(at_us));
            return Answered::Accepted { at_us };
        }
        *self.refused.entry(code).or_default() += 1;
        Answered::Refused
    }

    /// A message arrived at its recipient, or never will.
    pub fn landed(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// After a connection was lost: everything unanswered goes again, in order, with the same ids.
    pub fn repeat_all(&mut self) {
        self.later.clear();
        self.repeat.clear();
        self.repeat
            .extend(self.slots.iter().zip(self.base..).filter(|(slot, _)| matches!(slot, Slot::Waiting { .. })).map(|(_, number)| number));
        self.repeats += self.repeat.len() as u64;
    }

    /// What waited for its time goes again.
    pub fn wake_later(&mut self, now_us: u64) {
        let Self { later, repeat, repeats, .. } = self;
        later.retain(|&(at, number)| {
            let due = at <= now_us;
            if due {
                repeat.push_back(number);
                *repeats += 1;
            }
            !due
        });
    }
}
