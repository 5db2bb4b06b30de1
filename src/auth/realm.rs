//! Realm tokens: JWTs (RFC 7519) that a platform's identity provider signs for its users.
//!
//! The algorithm comes from the realm's allow list and the key itself; the token's header only picks among them.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, Validation};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::dev::DevRealm;
use super::jwks::{JwksError, KeySet, Lookup, Source};
use crate::clock::{Clock, UnixMillis};
use crate::config::{self, RealmAlgorithm};
use crate::ids::{Identity, RealmId};
use crate::limits;

/// Why a realm token is refused. Only [`TokenError::KeysUnavailable`] is worth a retry with the same token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Longer than [`limits::REALM_TOKEN_BYTES`].
    #[error("the token is longer than {} bytes", limits::REALM_TOKEN_BYTES)]
    TooLong,
    /// Not a signed JWT.
    #[error("not a signed JWT")]
    Malformed,
    /// No realm has this issuer and audience.
    #[error("no realm of this server has the token's issuer and audience")]
    UnknownRealm,
    /// Not EdDSA, ES256 or RS256, or not allowed for the realm.
    #[error("the realm does not sign with the token's algorithm")]
    WrongAlgorithm,
    /// The realm has no such key.
    #[error("the realm has no key with the token's key id")]
    UnknownKey,
    /// The signature is not the key's.
    #[error("the token's signature is wrong")]
    BadSignature,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
    /// Its time has not come.
    #[error("the token is not valid yet")]
    NotYetValid,
    /// Its `sub` can't be the user part of an identity.
    #[error("the token's subject is not a user name of 1 to 128 bytes without white space, '/' and '@'")]
    BadSubject,
    /// The realm's keys can't be had now. Retry later.
    #[error("the realm's keys can't be fetched now")]
    KeysUnavailable,
}

/// What a token's header says. Only these fields are used; `jwk`, `jku` and the like never are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenHeader {
    /// One of ours.
    pub algorithm: RealmAlgorithm,
    /// The key's name.
    pub kid: Option<String>,
}

#[derive(Deserialize)]
struct RawHeader {
    alg: String,
    kid: Option<String>,
    crit: Option<serde_json::Value>,
}

impl TokenHeader {
    /// Of a token in its compact form; nothing is verified.
    pub fn of(token: &str) -> Result<Self, TokenError> {
        let (header, _) = parts(token)?;
        let bytes = URL_SAFE_NO_PAD.decode(header).map_err(|_| TokenError::Malformed)?;
        let raw: RawHeader = serde_json::from_slice(&bytes).map_err(|_| TokenError::Malformed)?;
        // RFC 7515 section 4.1.11: what is critical and not understood must be refused; we understand none.
        if raw.crit.is_some() {
            return Err(TokenError::Malformed);
        }
        let algorithm = match raw.alg.as_str() {
            "EdDSA" => RealmAlgorithm::EdDSA,
            "ES256" => RealmAlgorithm::ES256,
            "RS256" => RealmAlgorithm::RS256,
            _ => return Err(TokenError::WrongAlgorithm),
        };
        Ok(Self { algorithm, kid: raw.kid })
    }
}

/// Header and payload, still encoded.
fn parts(token: &str) -> Result<(&str, &str), TokenError> {
    if token.len() > limits::REALM_TOKEN_BYTES {
        return Err(TokenError::TooLong);
    }
    let mut parts = token.split('.');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(header), Some(payload), Some(signature), None) if !signature.is_empty() => Ok((header, payload)),
        _ => Err(TokenError::Malformed),
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

impl Audience {
    fn holds(&self, audience: &str) -> bool {
        match self {
            Self::One(one) => one == audience,
            Self::Many(many) => many.iter().any(|one| one == audience),
        }
    }
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    aud: Audience,
    sub: String,
    /// Seconds since 1970, maybe with a fraction (RFC 7519 section 2).
    exp: f64,
    nbf: Option<f64>,
}

const fn algorithm(of: RealmAlgorithm) -> Algorithm {
    match of {
        RealmAlgorithm::EdDSA => Algorithm::EdDSA,
        RealmAlgorithm::ES256 => Algorithm::ES256,
        RealmAlgorithm::RS256 => Algorithm::RS256,
    }
}

struct Realm {
    name: RealmId,
    issuer: String,
    audience: String,
    algorithms: Vec<RealmAlgorithm>,
    keys: KeySet,
}

/// All realms whose users may register.
pub struct Realms {
    realms: Vec<Realm>,
    clock: Arc<dyn Clock>,
}

impl Realms {
    /// The configured realms, and the development ones whose names are free. A key file must be readable; a URL that fails is
    /// tried again when a token needs it.
    pub async fn open(configured: &[config::Realm], dev: Option<&DevRealm>, clock: Arc<dyn Clock>) -> Result<Self, JwksError> {
        let mut realms = Vec::new();
        for realm in configured {
            let source = match (&realm.jwks_file, &realm.jwks_url) {
                (Some(path), _) => Source::File(path.clone()),
                (None, Some(url)) => Source::url(url.clone(), realm.jwks_ca.as_deref())?,
                (None, None) => return Err(JwksError::Malformed("the realm names no keys".to_owned())),
            };
            let remote = matches!(source, Source::Url(..));
            let keys = KeySet::new(source, clock.clone());
            match keys.refresh().await {
                Err(error) if remote => {
                    tracing::warn!(realm = %realm.name, %error, "a realm's keys can't be fetched yet; its users can't register")
                }
                outcome => outcome?,
            }
            realms.push(Realm {
                name: realm.name.clone(),
                issuer: realm.issuer.clone(),
                audience: realm.audience.clone(),
                algorithms: realm.algorithms.clone(),
                keys,
            });
        }
        for (dev, name) in dev.into_iter().flat_map(|dev| DevRealm::names().map(move |name| (dev, name))) {
            if realms.iter().any(|realm| realm.name == name) {
                tracing::info!(realm = %name, "the realm is configured, so it has no development tokens");
                continue;
            }
            realms.push(Realm {
                issuer: DevRealm::issuer(&name),
                audience: DevRealm::AUDIENCE.to_owned(),
                algorithms: vec![RealmAlgorithm::EdDSA],
                keys: KeySet::fixed(vec![dev.public()?], clock.clone()),
                name,
            });
        }
        Ok(Self { realms, clock })
    }

    /// Whose token it is, if all of it is right: known realm, allowed algorithm, signature, times, subject.
    pub async fn verify(&self, token: &str) -> Result<Identity, TokenError> {
        let header = TokenHeader::of(token)?;
        // Not verified yet: it only picks the realm, whose keys then decide.
        let (_, payload) = parts(token)?;
        let payload = URL_SAFE_NO_PAD.decode(payload).map_err(|_| TokenError::Malformed)?;
        let claimed: Claims = serde_json::from_slice(&payload).map_err(|_| TokenError::Malformed)?;
        let named = |realm: &&Realm| realm.issuer == claimed.iss && claimed.aud.holds(&realm.audience);
        let realm = self.realms.iter().find(named).ok_or(TokenError::UnknownRealm)?;
        if !realm.algorithms.contains(&header.algorithm) {
            return Err(TokenError::WrongAlgorithm);
        }
        let key = match realm.keys.find(header.kid.as_deref(), header.algorithm).await {
            Lookup::Found(key) => key,
            Lookup::Unknown => return Err(TokenError::UnknownKey),
            Lookup::Unavailable => return Err(TokenError::KeysUnavailable),
        };
        let mut validation = Validation::new(algorithm(key.algorithm));
        // Times are checked below, with our own clock; issuer and audience again here, so that nothing unverified counts.
        validation.validate_exp = false;
        validation.set_issuer(&[&realm.issuer]);
        validation.set_audience(&[&realm.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        let verified = jsonwebtoken::decode::<Claims>(token, &key.key, &validation).map_err(|_| TokenError::BadSignature)?;
        check_times(&verified.claims, self.clock.now())?;
        Identity::new(&verified.claims.sub, realm.name.clone()).map_err(|_| TokenError::BadSubject)
    }

    /// Fetches all keys now and then, until cancelled.
    pub async fn keep_fresh(&self, until: CancellationToken) {
        let mut ticks = tokio::time::interval(Duration::from_millis(limits::JWKS_REFRESH_MS));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first tick is at once, and `open` has just fetched.
        ticks.tick().await;
        loop {
            tokio::select! {
                () = until.cancelled() => return,
                _ = ticks.tick() => {}
            }
            for realm in &self.realms {
                if let Err(error) = realm.keys.refresh().await {
                    tracing::warn!(realm = %realm.name, %error, "a realm's keys can't be refreshed; the known ones stay for a day");
                }
            }
        }
    }
}

fn check_times(claims: &Claims, now: UnixMillis) -> Result<(), TokenError> {
    // Milliseconds fit a double exactly; what is not finite is no time.
    let millis = |seconds: f64| if seconds.is_finite() { Ok(seconds * 1000.0) } else { Err(TokenError::Malformed) };
    let (now, leeway) = (now.0 as f64, limits::TOKEN_LEEWAY_MS as f64);
    if millis(claims.exp)? + leeway <= now {
        return Err(TokenError::Expired);
    }
    match claims.nbf.map(millis).transpose()? {
        Some(nbf) if nbf - leeway > now => Err(TokenError::NotYetValid),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::{ManualClock, SeededRandom};

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    async fn realms(clock: ManualClock) -> (Realms, DevRealm, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("a folder");
        let dev = DevRealm::open(dir.path(), &SeededRandom::new(1)).expect("opens");
        let realms = Realms::open(&[], Some(&dev), Arc::new(clock)).await.expect("opens");
        (realms, dev, dir)
    }

    #[tokio::test]
    async fn development_tokens_hold_for_their_time_and_realm() {
        let clock = ManualClock::new(NOW);
        let (realms, dev, _dir) = realms(clock.clone()).await;
        let alice: Identity = "alice@socialink".parse().expect("valid");
        let token = dev.sign(&alice, NOW, 60_000).expect("signs");
        assert_eq!(realms.verify(&token).await, Ok(alice));
        clock.advance(60_000 + limits::TOKEN_LEEWAY_MS - 1);
        assert!(realms.verify(&token).await.is_ok(), "within the leeway");
        clock.advance(1);
        assert_eq!(realms.verify(&token).await, Err(TokenError::Expired));
    }

    #[tokio::test]
    async fn changed_tokens_are_refused() {
        let (realms, dev, _dir) = realms(ManualClock::new(NOW)).await;
        let token = dev.sign(&"alice@local".parse().expect("valid"), NOW, 60_000).expect("signs");
        let (signed, signature) = token.rsplit_once('.').expect("three parts");
        let (header, payload) = signed.split_once('.').expect("three parts");
        let encode = |json: String| URL_SAFE_NO_PAD.encode(json);
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(payload).expect("base64")).expect("text");
        let with = |from: &str, to: &str| format!("{header}.{}.{signature}", encode(text.replace(from, to)));
        assert_eq!(realms.verify(&with("alice", "mallory")).await, Err(TokenError::BadSignature));
        assert_eq!(realms.verify(&with(":local", ":elsewhere")).await, Err(TokenError::UnknownRealm));
        assert_eq!(realms.verify(&with("\"sealpost\"", "\"other\"")).await, Err(TokenError::UnknownRealm));
        for alg in ["none", "HS256", "EdDSA\",\"crit\":[\"b64\"],\"x\":\"", "RS384"] {
            let forged = format!("{}.{payload}.{signature}", encode(format!(r#"{{"alg":"{alg}"}}"#)));
            assert!(realms.verify(&forged).await.is_err(), "{alg}");
        }
        let other_key = format!("{}.{payload}.{signature}", encode(r#"{"alg":"EdDSA","kid":"other"}"#.to_owned()));
        assert_eq!(realms.verify(&other_key).await, Err(TokenError::UnknownKey));
        for bad in ["", "a.b", "a.b.c.d", &format!("{signed}."), signed] {
            assert_eq!(realms.verify(bad).await, Err(TokenError::Malformed), "{bad}");
        }
        assert_eq!(realms.verify(&"a".repeat(limits::REALM_TOKEN_BYTES + 1)).await, Err(TokenError::TooLong));
    }

    #[test]
    fn times_must_be_numbers_and_now() {
        let claims = |exp, nbf| Claims { iss: String::new(), aud: Audience::Many(vec![]), sub: String::new(), exp, nbf };
        let now = NOW.0 as f64 / 1000.0;
        assert_eq!(check_times(&claims(now, Some(now)), NOW), Ok(()));
        assert_eq!(check_times(&claims(now + 100.0, Some(now + 61.0)), NOW), Err(TokenError::NotYetValid));
        assert_eq!(check_times(&claims(f64::NAN, None), NOW), Err(TokenError::Malformed));
        assert_eq!(check_times(&claims(-1.0, None), NOW), Err(TokenError::Expired));
    }

    proptest! {
        #[test]
        fn any_header_is_parsed_or_refused(token in "[A-Za-z0-9_.-]{0,200}", json in any::<String>()) {
            let _ = TokenHeader::of(&token);
            let _ = TokenHeader::of(&format!("{}.e30.c2ln", URL_SAFE_NO_PAD.encode(json)));
        }
    }
}
