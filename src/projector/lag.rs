//! How far delivery is behind acceptance, by looking now and then at where the log ends and how far the projector is.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::limits;

/// Looks that are remembered: enough to see back as far as the cap.
const LOOKS: usize = (limits::LAG_MS / limits::LAG_LOOK_MS) as usize + 1;

/// The looks behind whose end the projector still is.
#[derive(Debug, Default)]
pub struct Lag {
    /// When the log was seen to end where: both grow.
    looks: VecDeque<(Instant, u64)>,
    behind: bool,
}

impl Lag {
    /// Notes where the log ends and how far the projector is, both as counts of records that only grow. True: what was accepted
    /// more than [`limits::LAG_MS`] ago has not been met by the projector, or had not been and it is not yet back at half of that.
    pub fn look(&mut self, now: Instant, end: u64, met: u64) -> bool {
        while self.looks.front().is_some_and(|(_, end)| *end <= met) {
            self.looks.pop_front();
        }
        if end > met && self.looks.back().is_none_or(|(_, seen)| *seen < end) {
            let full = self.looks.len() >= LOOKS;
            match self.looks.back_mut() {
                // Counted as older than it is: better too long behind than too short.
                Some((_, seen)) if full => *seen = end,
                _ => self.looks.push_back((now, end)),
            }
        }
        let lag = self.looks.front().map_or(Duration::ZERO, |(since, _)| now - *since);
        let cap = Duration::from_millis(limits::LAG_MS);
        self.behind = lag > if self.behind { cap / 2 } else { cap };
        self.behind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK: Duration = Duration::from_millis(limits::LAG_LOOK_MS);
    const CAP: Duration = Duration::from_millis(limits::LAG_MS);

    #[test]
    fn who_keeps_up_is_never_behind() {
        let (mut lag, start) = (Lag::default(), Instant::now());
        for n in 0..10_000u32 {
            // Never at the end, but never far from it.
            let end = 1_000 + 100 * u64::from(n);
            assert!(!lag.look(start + LOOK * n, end, end - 150), "{n}");
            assert!(lag.looks.len() <= 2);
        }
    }

    #[test]
    fn one_past_the_cap_is_behind_until_half_of_it_is_made_good() {
        let (mut lag, start) = (Lag::default(), Instant::now());
        assert!(!lag.look(start, 10, 9));
        assert!(!lag.look(start + CAP, 20, 9), "at the cap");
        assert!(lag.look(start + CAP + Duration::from_millis(1), 20, 9), "one past it");
        assert!(!lag.look(start + CAP + LOOK, 20, 10), "what is left came just before");
        assert!(!lag.look(start + CAP + LOOK * 2, 20, 20));
        assert!(lag.looks.is_empty());
    }

    #[test]
    fn a_projector_that_stands_still_is_behind_for_as_long_as_it_does() {
        let (mut lag, start) = (Lag::default(), Instant::now());
        let looks = 4 * LOOKS as u32;
        for n in 0..looks {
            // The log goes on growing: acknowledgements, for one, are never refused.
            let behind = lag.look(start + LOOK * n, 1_000 + u64::from(n), 999);
            assert_eq!(behind, LOOK * n > CAP, "{n}");
            assert!(lag.looks.len() <= LOOKS, "bounded");
        }
        let now = |n: u32| start + LOOK * (looks + n);
        assert!(lag.look(now(0), 2_000, 1_000), "it moves, and is behind still");
        assert!(lag.look(now(1), 2_000, 1_000 + u64::from(looks) - 2), "all but the last of what came while it stood");
        assert!(!lag.look(now(2), 2_000, 2_000));
        assert!(!lag.look(now(3), 2_001, 2_000), "as if nothing had been");
    }
}
