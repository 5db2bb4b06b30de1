//! Rate limits of requests, and whose request it is.

use std::net::IpAddr;
use std::time::Duration;

use axum::http::HeaderMap;

use crate::config::Config;
use crate::edge::error::ApiError;
use crate::ids::DeviceAddr;
use crate::limits;
use crate::metrics::{self, RateScope};
use crate::rate::{Address, Keyed};

/// The limits on requests. Those on messages and key fetches are with what they protect.
pub struct RateLimits {
    ip: Keyed<Address>,
    device: Keyed<DeviceAddr>,
    registrations: Keyed<Address>,
    auth_failures: Keyed<Address>,
    trusted_proxies: Vec<IpAddr>,
}

impl RateLimits {
    /// As configured.
    pub fn new(config: &Config) -> Self {
        let rates = config.rates();
        let second = |count: u32| (count, Duration::from_secs(1), count.saturating_mul(10));
        let keyed_ip = |(count, period, burst)| Keyed::new(count, period, burst);
        let (count, period, burst) = second(rates.requests_per_device_per_s);
        Self {
            ip: keyed_ip(second(rates.requests_per_ip_per_s)),
            device: Keyed::new(count, period, burst),
            registrations: Keyed::new(rates.registrations_per_ip_per_h, Duration::from_secs(3600), rates.registrations_per_ip_per_h),
            auth_failures: Keyed::new(rates.auth_failures_per_ip_per_min, Duration::from_secs(60), rates.auth_failures_per_ip_per_min),
            trusted_proxies: config.limits.trusted_proxies.iter().map(IpAddr::to_canonical).collect(),
        }
    }

    /// A request of this address.
    pub fn request_from(&self, client: Client) -> Result<(), ApiError> {
        limited(self.ip.check(&client.address), RateScope::Ip)
    }

    /// A request of this device.
    pub fn request_of(&self, device: DeviceAddr) -> Result<(), ApiError> {
        limited(self.device.check(&device), RateScope::Device)
    }

    /// A registration from this address.
    pub fn registration_from(&self, client: Client) -> Result<(), ApiError> {
        limited(self.registrations.check(&client.address), RateScope::Registrations)
    }

    /// A failed authentication from this address.
    pub fn auth_failure_from(&self, client: Client) -> Result<(), ApiError> {
        limited(self.auth_failures.check(&client.address), RateScope::AuthFailures)
    }

    /// Whose request it is: the peer, or what a trusted proxy says in `X-Forwarded-For`.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> Client {
        let trusted = |ip: &IpAddr| self.trusted_proxies.contains(&ip.to_canonical());
        let mut client = peer;
        if trusted(&peer) {
            // The nearest proxy's address is last. What stands before the first one that is not trusted may be made up.
            let texts = headers.get_all("x-forwarded-for").iter().rev().filter_map(|value| value.to_str().ok());
            let hops = texts.flat_map(|text| text.rsplit(',')).take(limits::FORWARDED_HOPS);
            for hop in hops {
                match hop.trim().parse::<IpAddr>() {
                    Ok(ip) => client = ip,
                    Err(_) => break,
                }
                if !trusted(&client) {
                    break;
                }
            }
        }
        // A proxy on this machine that nobody told us of would make everybody look like this machine.
        let forwarded = client == peer && ["x-forwarded-for", "forwarded"].iter().any(|name| headers.contains_key(*name));
        Client { address: Address::from(client), loopback: client.to_canonical().is_loopback() && !forwarded }
    }
}

fn limited(outcome: Result<(), u32>, scope: RateScope) -> Result<(), ApiError> {
    outcome.map_err(|retry_after_ms| {
        metrics::observe_rate_limited(scope);
        ApiError::rate_limited(retry_after_ms)
    })
}

/// Whose request it is; an extension of every request behind the outer layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Client {
    /// The address that limits count.
    pub address: Address,
    /// From this machine.
    pub loopback: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(config: &str, peer: &str, forwarded: &[&str]) -> Client {
        let limits = RateLimits::new(&toml::from_str(config).expect("parses"));
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append("x-forwarded-for", value.parse().expect("a value"));
        }
        limits.client(peer.parse().expect("an address"), &headers)
    }

    fn of(ip: &str) -> Address {
        Address::from(ip.parse::<IpAddr>().expect("an address"))
    }

    #[test]
    fn forwarded_addresses_count_only_from_trusted_proxies() {
        let proxies = "[limits]\ntrusted_proxies = [\"10.0.0.1\", \"10.0.0.2\"]";
        assert_eq!(client("", "10.0.0.1", &["1.1.1.1"]).address, of("10.0.0.1"), "nobody is trusted");
        assert_eq!(client(proxies, "9.9.9.9", &["1.1.1.1"]).address, of("9.9.9.9"), "this one is not");
        assert_eq!(client(proxies, "10.0.0.1", &["6.6.6.6, 1.1.1.1"]).address, of("1.1.1.1"), "what it saw, not what it was told");
        assert_eq!(client(proxies, "10.0.0.1", &["6.6.6.6, 1.1.1.1, 10.0.0.2"]).address, of("1.1.1.1"), "two proxies");
        assert_eq!(client(proxies, "10.0.0.1", &["1.1.1.1", "10.0.0.2"]).address, of("1.1.1.1"), "in two header fields");
        assert_eq!(client(proxies, "10.0.0.1", &["nonsense"]).address, of("10.0.0.1"));
        assert!(client("", "::ffff:127.0.0.1", &[]).loopback && !client(proxies, "10.0.0.1", &["1.1.1.1"]).loopback);
        assert!(!client("", "127.0.0.1", &["1.1.1.1"]).loopback, "an unknown proxy on this machine");
        let local = "[limits]\ntrusted_proxies = [\"127.0.0.1\"]";
        assert!(!client(local, "127.0.0.1", &["1.1.1.1"]).loopback);
    }

    #[test]
    fn limits_are_separate_and_say_when_to_come_back() {
        let config = toml::from_str("dev = false\n[limits]\nrequests_per_ip_per_s = 1\nregistrations_per_ip_per_h = 1").expect("parses");
        let limits = RateLimits::new(&config);
        let client = Client { address: of("1.1.1.1"), loopback: false };
        assert!((0..10).all(|_| limits.request_from(client).is_ok()), "the burst");
        assert!(limits.request_from(client).is_err());
        limits.registration_from(client).expect("the first");
        assert!(limits.registration_from(client).expect_err("the second").retry_after_ms > 3_000_000);
    }
}
