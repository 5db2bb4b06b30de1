//! Rate limits by key (a device, an address), bounded in memory.

use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use parking_lot::RwLock;

use crate::limits;

/// How many checks pass between two looks at how many keys there are.
const LOOK_EVERY: u32 = 1_024;

/// Lets a number of things a period pass for each key (generic cell rate algorithm).
///
/// At most about [`limits::RATE_KEYS`] keys are remembered: past that those that are idle are forgotten, and if that is not
/// enough all of them, which forgives each once.
pub struct Keyed<K: Hash + Eq + Clone>(Option<Inner<K>>);

struct Inner<K: Hash + Eq + Clone> {
    quota: Quota,
    limiter: RwLock<Arc<DefaultKeyedRateLimiter<K>>>,
    checks: AtomicU32,
    keys_max: usize,
}

impl<K: Hash + Eq + Clone> Keyed<K> {
    /// `count` a period on average, and `burst` at once. A count of 0 is no limit, and costs nothing.
    pub fn new(count: u32, period: Duration, burst: u32) -> Self {
        Self::with_cap(count, period, burst, limits::RATE_KEYS)
    }

    fn with_cap(count: u32, period: Duration, burst: u32, keys_max: usize) -> Self {
        let quota = NonZeroU32::new(count).and_then(|count| Quota::with_period(period / count.get()));
        Self(quota.map(|quota| {
            let quota = quota.allow_burst(NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN));
            Inner { quota, limiter: RwLock::new(Arc::new(RateLimiter::keyed(quota))), checks: AtomicU32::new(0), keys_max }
        }))
    }

    /// Forgets keys that are idle before there are too many; called now and then.
    pub fn tidy(&self) {
        if let Some(inner) = &self.0 {
            inner.limiter.read().clone().retain_recent();
        }
    }

    /// Takes one, or says in how many milliseconds one is free.
    pub fn check(&self, key: &K) -> Result<(), u32> {
        self.check_n(key, NonZeroU32::MIN)
    }

    /// Takes so many at once, or none.
    pub fn check_n(&self, key: &K, count: NonZeroU32) -> Result<(), u32> {
        let Some(inner) = &self.0 else { return Ok(()) };
        if inner.checks.fetch_add(1, Ordering::Relaxed) % LOOK_EVERY == LOOK_EVERY - 1 {
            inner.bound();
        }
        let limiter = inner.limiter.read().clone();
        // More than the burst at once can never pass: then the burst counts.
        let count = count.min(inner.quota.burst_size());
        match limiter.check_key_n(key, count) {
            Ok(Ok(())) | Err(_) => Ok(()),
            Ok(Err(later)) => {
                let wait = later.wait_time_from(DefaultClock::default().now()).as_millis();
                Err(u32::try_from(wait).unwrap_or(u32::MAX).max(1))
            }
        }
    }
}

impl<K: Hash + Eq + Clone> Inner<K> {
    fn bound(&self) {
        let limiter = self.limiter.read().clone();
        if limiter.len() <= self.keys_max {
            return;
        }
        limiter.retain_recent();
        if limiter.len() > self.keys_max {
            *self.limiter.write() = Arc::new(RateLimiter::keyed(self.quota));
        } else {
            limiter.shrink_to_fit();
        }
    }
}

/// What counts as one address: an IPv4 address, or the /64 of an IPv6 one (a household has that many).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address(IpAddr);

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V6(v6) => {
                let [a, b, c, d, ..] = v6.segments();
                IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
            }
            v4 => v4,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_the_rate_holds_for_each_key() {
        let limit = Keyed::new(1, Duration::from_secs(60), 2);
        assert_eq!((limit.check(&1), limit.check(&1)), (Ok(()), Ok(())));
        let wait = limit.check(&1).expect_err("limited");
        assert!((55_000..=60_000).contains(&wait), "{wait}");
        assert_eq!(limit.check(&2), Ok(()), "another key");
        assert_eq!(limit.check_n(&3, NonZeroU32::new(100).expect("not 0")), Ok(()), "more than the burst counts as the burst");
        assert!(limit.check(&3).is_err());
    }

    #[test]
    fn no_limit_is_none() {
        let limit = Keyed::new(0, Duration::from_secs(1), 1);
        assert!((0..10_000).all(|_| limit.check(&()).is_ok()));
    }

    #[test]
    fn keys_are_bounded() {
        let limit = Keyed::with_cap(1, Duration::from_secs(60), 1, 100);
        for key in 0..10_000u32 {
            let _ = limit.check(&key);
        }
        let held = limit.0.as_ref().map_or(0, |inner| inner.limiter.read().len());
        assert!(held <= 100 + LOOK_EVERY as usize, "{held}");
    }

    #[test]
    fn one_key_past_the_cap_makes_room_and_none_at_the_cap() {
        let limit = Keyed::with_cap(1, Duration::from_secs(60), 1, 100);
        let inner = limit.0.as_ref().expect("limited");
        assert!((0..100).all(|key| limit.check(&key).is_ok()));
        inner.bound();
        assert!((0..100).all(|key| limit.check(&key).is_err()), "all of them are remembered");
        assert_eq!(limit.check(&100), Ok(()));
        inner.bound();
        assert_eq!(inner.limiter.read().len(), 0);
        assert_eq!(limit.check(&0), Ok(()), "forgiven once");
    }

    #[test]
    fn idle_keys_are_forgotten_without_waiting_for_the_cap() {
        let limit = Keyed::new(1_000_000, Duration::from_secs(1), 1);
        assert!((0..100).all(|key| limit.check(&key).is_ok()));
        std::thread::sleep(Duration::from_millis(5));
        limit.tidy();
        assert_eq!(limit.0.as_ref().map(|inner| inner.limiter.read().len()), Some(0));
    }

    #[test]
    fn addresses_of_one_household_are_one() {
        let address = |text: &str| Address::from(text.parse::<IpAddr>().expect("an address"));
        assert_eq!(address("2001:db8::1"), address("2001:db8::ffff:1:2:3"));
        assert_ne!(address("2001:db8::1"), address("2001:db8:0:1::1"));
        assert_eq!(address("::ffff:10.0.0.1"), address("10.0.0.1"));
    }
}
