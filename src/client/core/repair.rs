//! Decisions without I/O: what to do with the answer to a send, with a message that can't be decrypted, and how long to
//! wait before the next attempt.

use std::collections::BTreeSet;

use crate::clock::{Random, UnixMillis};
use crate::ids::DeviceId;
use crate::wire::stream::Code;

/// Rounds of device repair for one message. Somebody who registers devices faster than this is not served.
pub const REPAIR_ROUNDS: u32 = 10;
/// Requests to repeat, for one device within [`RETRY_WINDOW_MS`].
pub const RETRIES_PER_WINDOW: u32 = 8;
/// See [`RETRIES_PER_WINDOW`]: an hour.
pub const RETRY_WINDOW_MS: u64 = 3_600_000;
/// How often one message is sent again because its reader asked.
pub const RESENDS_PER_MESSAGE: u32 = 4;
/// The longest wait between two attempts.
pub const BACKOFF_MAX_MS: u64 = 30_000;

/// The answer to a send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its code.
    pub code: Code,
    /// With `DEVICE_MISMATCH`: devices without an envelope.
    pub missing: Vec<DeviceId>,
    /// With `DEVICE_MISMATCH`: devices that do not exist.
    pub extra: Vec<DeviceId>,
    /// With `STALE_DEVICES`: devices that are another installation now.
    pub stale: Vec<DeviceId>,
    /// When to try again at the earliest; 0 if it does not say.
    pub retry_after_ms: u64,
}

impl Answer {
    /// An answer that is only a code.
    pub fn of(code: Code) -> Self {
        Self { code, missing: Vec::new(), extra: Vec::new(), stale: Vec::new(), retry_after_ms: 0 }
    }
}

/// What to do next with a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// It is accepted: durable on the server.
    Accepted,
    /// Repair the recipient's devices, then send again under the same client message id.
    Repair(Plan),
    /// Send the same bytes again after this many milliseconds.
    RetryIn(u64),
    /// Send again under a new client message id.
    NewId,
    /// It will never be accepted.
    Fail,
    /// This device is not known to the server any more.
    SignedOut,
}

/// How to make a message's envelopes fit the recipient's devices. Envelopes of devices that are not named stay as they are:
/// encrypting them again would be safe but pointless.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Devices to forget: their sessions, and their envelopes.
    pub forget: BTreeSet<DeviceId>,
    /// Devices whose session is for another installation: archive it, then fetch.
    pub archive: BTreeSet<DeviceId>,
    /// Devices to fetch keys of, begin a session with, and encrypt for.
    pub fetch: BTreeSet<DeviceId>,
}

/// Decides on an answer. `attempts` counts those before; `rounds` the repairs so far.
pub fn decide(answer: &Answer, attempts: u32, rounds: u32, random: &dyn Random) -> Next {
    match answer.code {
        Code::Ok => Next::Accepted,
        Code::DeviceMismatch | Code::StaleDevices if rounds >= REPAIR_ROUNDS => Next::Fail,
        Code::DeviceMismatch | Code::StaleDevices => {
            let plan = plan(answer);
            // An answer that names nobody can't be acted upon; it must not become a busy loop.
            if plan == Plan::default() { Next::RetryIn(backoff(attempts, random)) } else { Next::Repair(plan) }
        }
        Code::RateLimited | Code::Unavailable | Code::OutcomeUnknown | Code::InboxFull | Code::Internal => {
            Next::RetryIn(answer.retry_after_ms.saturating_add(backoff(attempts, random)))
        }
        Code::StaleMessageId => Next::NewId,
        Code::Unauthenticated => Next::SignedOut,
        Code::BadRequest
        | Code::Forbidden
        | Code::Blocked
        | Code::NotFound
        | Code::TooLarge
        | Code::AccountDeleted
        | Code::Conflict
        | Code::LimitReached => Next::Fail,
    }
}

fn plan(answer: &Answer) -> Plan {
    let archive: BTreeSet<DeviceId> = answer.stale.iter().copied().collect();
    let fetch = answer.missing.iter().copied().chain(archive.iter().copied()).collect();
    Plan { forget: answer.extra.iter().copied().collect(), archive, fetch }
}

/// A wait that doubles with each attempt from 250 ms to 30 s, of which a random part is taken ("full jitter"), so that a
/// server that comes back is not met by everybody at once.
pub fn backoff(attempts: u32, random: &dyn Random) -> u64 {
    jitter((250u64 << attempts.min(20)).min(BACKOFF_MAX_MS), random)
}

/// A random wait of up to `most` milliseconds.
pub fn jitter(most: u64, random: &dyn Random) -> u64 {
    let mut bytes = [0; 8];
    random.fill(&mut bytes);
    u64::from_le_bytes(bytes) % (most + 1)
}

/// How often a device was asked to repeat, within a window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Asked {
    /// When the window began.
    pub since: UnixMillis,
    /// Requests since then.
    pub count: u32,
}

/// A message could not be decrypted: whether to begin a new session and ask for it again. Bounded, so that two broken
/// devices do not talk for ever. `None`: no; else what to remember.
pub fn ask_again(asked: Asked, now: UnixMillis) -> Option<Asked> {
    if asked.count == 0 || now.since(asked.since) >= RETRY_WINDOW_MS {
        return Some(Asked { since: now, count: 1 });
    }
    (asked.count < RETRIES_PER_WINDOW).then(|| Asked { count: asked.count + 1, ..asked })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SeededRandom;

    fn device(number: u32) -> DeviceId {
        DeviceId::new(number).expect("valid")
    }

    #[test]
    fn mismatches_are_repaired_for_the_devices_named_only() {
        let random = SeededRandom::new(1);
        let answer = Answer { missing: vec![device(2)], extra: vec![device(3)], ..Answer::of(Code::DeviceMismatch) };
        let plan = Plan { forget: [device(3)].into(), fetch: [device(2)].into(), ..Plan::default() };
        assert_eq!(decide(&answer, 0, 0, &random), Next::Repair(plan));
        let answer = Answer { stale: vec![device(1)], ..Answer::of(Code::StaleDevices) };
        let plan = Plan { archive: [device(1)].into(), fetch: [device(1)].into(), ..Plan::default() };
        assert_eq!(decide(&answer, 0, 0, &random), Next::Repair(plan));
        assert_eq!(decide(&answer, 0, REPAIR_ROUNDS, &random), Next::Fail);
        assert!(matches!(decide(&Answer::of(Code::DeviceMismatch), 3, 0, &random), Next::RetryIn(_)), "never a busy loop");
    }

    #[test]
    fn passing_troubles_are_retried_and_final_ones_are_not() {
        let random = SeededRandom::new(2);
        for code in [Code::RateLimited, Code::Unavailable, Code::OutcomeUnknown, Code::InboxFull, Code::Internal] {
            let answer = Answer { retry_after_ms: 700, ..Answer::of(code) };
            assert!(matches!(decide(&answer, 2, 0, &random), Next::RetryIn(ms) if (700..=1_700).contains(&ms)), "{code:?}");
        }
        for code in [Code::Blocked, Code::NotFound, Code::AccountDeleted, Code::TooLarge, Code::BadRequest] {
            assert_eq!(decide(&Answer::of(code), 0, 0, &random), Next::Fail);
        }
        assert_eq!(decide(&Answer::of(Code::StaleMessageId), 0, 0, &random), Next::NewId);
        assert_eq!(decide(&Answer::of(Code::Unauthenticated), 0, 0, &random), Next::SignedOut);
    }

    #[test]
    fn waits_grow_are_capped_and_differ() {
        let random = SeededRandom::new(3);
        let longest = |attempts| (0..200).map(|_| backoff(attempts, &random)).max().unwrap_or_default();
        assert!(longest(0) <= 250 && longest(3) > 1_000 && longest(60) <= BACKOFF_MAX_MS);
        let waits: BTreeSet<u64> = (0..50).map(|_| backoff(10, &random)).collect();
        assert!(waits.len() > 40);
    }

    #[test]
    fn asking_again_is_bounded() {
        let mut asked = Asked::default();
        for _ in 0..RETRIES_PER_WINDOW {
            asked = ask_again(asked, UnixMillis(5_000)).expect("within the budget");
        }
        assert_eq!(ask_again(asked, UnixMillis(6_000)), None);
        assert!(ask_again(asked, UnixMillis(5_000 + RETRY_WINDOW_MS)).is_some());
    }
}
