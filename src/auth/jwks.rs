//! A realm's public keys (RFC 7517): parsed strictly, cached, refreshed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::DecodingKey;
use parking_lot::RwLock;
use serde::Deserialize;
use url::Url;

use crate::clock::{Clock, UnixMillis};
use crate::config::RealmAlgorithm;
use crate::limits;

/// Why a key set can't be had.
#[derive(Debug, thiserror::Error)]
pub enum JwksError {
    /// The file can't be read.
    #[error("the key file {path} can't be read: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The URL does not answer as it should. Retry later.
    #[error("the keys can't be fetched: {0}")]
    Fetch(String),
    /// Larger than [`limits::JWKS_BYTES`].
    #[error("the key set is larger than {} bytes", limits::JWKS_BYTES)]
    TooLarge,
    /// Not a JWK set, or none of its keys can be used.
    #[error("the key set is not usable: {0}")]
    Malformed(String),
}

/// A public key that may sign tokens, with the one algorithm it is for.
pub struct RealmKey {
    /// Its name, if it has one.
    pub kid: Option<String>,
    /// The only algorithm it is used with.
    pub algorithm: RealmAlgorithm,
    /// The key.
    pub key: DecodingKey,
}

impl std::fmt::Debug for RealmKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RealmKey").field("kid", &self.kid).field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct RawSet {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct RawKey {
    kty: String,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
    n: Option<String>,
    e: Option<String>,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
}

/// The usable keys of a JWK set. Keys of other kinds (encryption, curves and algorithms that are not ours, symmetric) are left out.
pub fn parse(document: &[u8]) -> Result<Vec<RealmKey>, JwksError> {
    if document.len() > limits::JWKS_BYTES {
        return Err(JwksError::TooLarge);
    }
    let set: RawSet = serde_json::from_slice(document).map_err(|e| JwksError::Malformed(e.to_string()))?;
    let keys: Vec<_> = set
        .keys
        .into_iter()
        .filter_map(|value| serde_json::from_value::<RawKey>(value).ok().and_then(usable))
        .take(limits::JWKS_KEYS)
        .collect();
    if keys.is_empty() {
        return Err(JwksError::Malformed("it holds no key for EdDSA, ES256 or RS256 signatures".to_owned()));
    }
    Ok(keys)
}

/// The decoded length of a base64url field.
fn bytes_of(field: Option<&String>) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(field?).ok()
}

fn usable(raw: RawKey) -> Option<RealmKey> {
    if raw.usage.as_deref().is_some_and(|usage| usage != "sig") {
        return None;
    }
    if raw.key_ops.as_ref().is_some_and(|ops| !ops.iter().any(|op| op == "verify")) {
        return None;
    }
    // Lengths are checked here: the verifier trusts them.
    let (algorithm, key, names) = match (raw.kty.as_str(), raw.crv.as_deref()) {
        ("OKP", Some("Ed25519")) => {
            bytes_of(raw.x.as_ref()).filter(|x| x.len() == 32)?;
            (RealmAlgorithm::EdDSA, DecodingKey::from_ed_components(raw.x.as_ref()?).ok()?, ["EdDSA", "Ed25519"])
        }
        ("EC", Some("P-256")) => {
            bytes_of(raw.x.as_ref()).filter(|x| x.len() == 32)?;
            bytes_of(raw.y.as_ref()).filter(|y| y.len() == 32)?;
            (RealmAlgorithm::ES256, DecodingKey::from_ec_components(raw.x.as_ref()?, raw.y.as_ref()?).ok()?, ["ES256", "ES256"])
        }
        ("RSA", _) => {
            bytes_of(raw.n.as_ref()).filter(|n| (256..=1024).contains(&n.len()) && n[0] != 0)?;
            bytes_of(raw.e.as_ref()).filter(|e| (1..=4).contains(&e.len()))?;
            (RealmAlgorithm::RS256, DecodingKey::from_rsa_components(raw.n.as_ref()?, raw.e.as_ref()?).ok()?, ["RS256", "RS256"])
        }
        _ => return None,
    };
    if raw.alg.as_deref().is_some_and(|alg| !names.contains(&alg)) {
        return None;
    }
    Some(RealmKey { kid: raw.kid, algorithm, key })
}

/// Where a realm's keys come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// An HTTPS address.
    Url(Url, reqwest::Client),
    /// Keys that never change: the development realms'.
    Fixed,
}

impl Source {
    /// By HTTP, with time-outs, without redirects (the configured address is the trusted one). With `ca` (PEM) only those
    /// authorities vouch for it.
    pub fn url(url: Url, ca: Option<&Path>) -> Result<Self, JwksError> {
        // An error means that somebody installed one before, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder();
        if let Some(ca) = ca {
            builder = builder.tls_certs_only(authorities(ca)?);
        }
        let client = builder
            .connect_timeout(Duration::from_secs(3))
            .timeout(Duration::from_secs(8))
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("sealpost/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| JwksError::Fetch(e.to_string()))?;
        Ok(Self::Url(url, client))
    }

    async fn load(&self) -> Result<Vec<RealmKey>, JwksError> {
        match self {
            Self::File(path) => {
                let path = path.clone();
                tokio::task::spawn_blocking(move || read_file(&path)).await.map_err(|e| JwksError::Fetch(e.to_string()))?
            }
            Self::Url(url, client) => parse(&fetch(url, client).await?),
            Self::Fixed => Err(JwksError::Fetch("these keys never change".to_owned())),
        }
    }
}

fn authorities(path: &Path) -> Result<Vec<reqwest::Certificate>, JwksError> {
    let wrong = |source| JwksError::File { path: path.into(), source };
    let pem = std::fs::read(path).map_err(wrong)?;
    let all = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| wrong(std::io::Error::other(error)))?;
    if all.is_empty() { Err(wrong(std::io::Error::other("it holds no certificate"))) } else { Ok(all) }
}

fn read_file(path: &Path) -> Result<Vec<RealmKey>, JwksError> {
    let wrong = |source| JwksError::File { path: path.into(), source };
    if std::fs::metadata(path).map_err(wrong)?.len() > limits::JWKS_BYTES as u64 {
        return Err(JwksError::TooLarge);
    }
    parse(&std::fs::read(path).map_err(wrong)?)
}

async fn fetch(url: &Url, client: &reqwest::Client) -> Result<Vec<u8>, JwksError> {
    let failed = |e: reqwest::Error| JwksError::Fetch(e.without_url().to_string());
    let mut response = client.get(url.clone()).send().await.map_err(failed)?;
    if !response.status().is_success() {
        return Err(JwksError::Fetch(format!("status {}", response.status().as_u16())));
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        if body.len() + chunk.len() > limits::JWKS_BYTES {
            return Err(JwksError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// What was found for a token's header.
#[derive(Debug, Clone)]
pub enum Lookup {
    /// This key.
    Found(Arc<RealmKey>),
    /// The realm has no such key.
    Unknown,
    /// The realm's keys can't be had now.
    Unavailable,
}

#[derive(Default)]
struct State {
    keys: Vec<Arc<RealmKey>>,
    fetched: Option<UnixMillis>,
    tried: Option<UnixMillis>,
}

/// A realm's keys, cached.
pub struct KeySet {
    source: Source,
    clock: Arc<dyn Clock>,
    state: RwLock<State>,
    /// Held while the source is read, so that a thousand tokens with a new key cost one fetch.
    fetching: tokio::sync::Mutex<()>,
}

impl KeySet {
    /// Nothing is read yet.
    pub fn new(source: Source, clock: Arc<dyn Clock>) -> Self {
        Self { source, clock, state: RwLock::default(), fetching: tokio::sync::Mutex::new(()) }
    }

    /// Keys that never change.
    pub fn fixed(keys: Vec<RealmKey>, clock: Arc<dyn Clock>) -> Self {
        let set = Self::new(Source::Fixed, clock);
        set.state.write().keys = keys.into_iter().map(Arc::new).collect();
        set
    }

    /// Reads the source now. On failure the keys that are known stay, for a bounded time.
    pub async fn refresh(&self) -> Result<(), JwksError> {
        if matches!(self.source, Source::Fixed) {
            return Ok(());
        }
        let _one = self.fetching.lock().await;
        self.load().await
    }

    async fn load(&self) -> Result<(), JwksError> {
        self.state.write().tried = Some(self.clock.now());
        let keys = self.source.load().await?;
        let mut state = self.state.write();
        state.keys = keys.into_iter().map(Arc::new).collect();
        state.fetched = Some(self.clock.now());
        Ok(())
    }

    /// The key that a token's header names. One that is not known makes the source be read again, at most every
    /// [`limits::JWKS_REFRESH_MIN_MS`].
    pub async fn find(&self, kid: Option<&str>, algorithm: RealmAlgorithm) -> Lookup {
        match self.known(kid, algorithm) {
            Lookup::Found(key) => return Lookup::Found(key),
            other if matches!(self.source, Source::Fixed) => return other,
            _ => {}
        }
        let _one = self.fetching.lock().await;
        let tried = self.state.read().tried;
        if tried.is_none_or(|tried| self.clock.now().since(tried) >= limits::JWKS_REFRESH_MIN_MS)
            && !matches!(self.known(kid, algorithm), Lookup::Found(_))
            && let Err(error) = self.load().await
        {
            tracing::warn!(%error, "a realm's keys can't be refreshed");
        }
        self.known(kid, algorithm)
    }

    fn known(&self, kid: Option<&str>, algorithm: RealmAlgorithm) -> Lookup {
        let state = self.state.read();
        let fresh = match (&self.source, state.fetched) {
            (Source::Fixed, _) => true,
            (_, None) => false,
            (_, Some(fetched)) => self.clock.now().since(fetched) <= limits::JWKS_STALE_MAX_MS,
        };
        if !fresh {
            return Lookup::Unavailable;
        }
        let mut fitting = state.keys.iter().filter(|key| key.algorithm == algorithm);
        let found = match kid {
            Some(kid) => fitting.find(|key| key.kid.as_deref() == Some(kid)),
            // A token without a key id is only clear if there is one key it can mean.
            None => fitting.next().filter(|_| fitting.next().is_none()),
        };
        found.map_or(Lookup::Unknown, |key| Lookup::Found(key.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    const ED: &str = r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","kid":"ed"}"#;
    const EC: &str = r#"{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0","kid":"ec"}"#;

    fn set(keys: &[&str]) -> String {
        format!(r#"{{"keys":[{}]}}"#, keys.join(","))
    }

    #[test]
    fn usable_keys_are_taken_and_others_left() {
        let keys = parse(
            set(&[
                ED,
                EC,
                r#"{"kty":"oct","k":"c2VjcmV0"}"#,
                r#"{"kty":"OKP","crv":"Ed25519","x":"AAAA","kid":"short"}"#,
                r#"{"kty":"RSA","n":"AQAB","e":"AQAB","kid":"weak"}"#,
                r#"{"kty":"EC","crv":"P-384","x":"AA","y":"AA"}"#,
                r#""nonsense""#,
                &ED.replace("\"ed\"", "\"enc\",\"use\":\"enc\""),
                &ED.replace("\"ed\"", "\"other\",\"alg\":\"HS256\""),
                &ED.replace("\"ed\"", "\"ops\",\"key_ops\":[\"sign\"]"),
            ])
            .as_bytes(),
        )
        .expect("parses");
        let kids: Vec<_> = keys.iter().filter_map(|key| key.kid.as_deref()).collect();
        assert_eq!(kids, ["ed", "ec"]);
    }

    #[test]
    fn documents_that_are_not_key_sets_are_refused() {
        for bad in ["", "[]", "{}", r#"{"keys":[]}"#, r#"{"keys":[{"kty":"oct","k":"AA"}]}"#] {
            assert!(matches!(parse(bad.as_bytes()), Err(JwksError::Malformed(_))), "{bad}");
        }
        assert!(matches!(parse(&vec![b' '; limits::JWKS_BYTES + 1]), Err(JwksError::TooLarge)));
    }

    #[test]
    fn no_more_keys_than_the_cap_are_kept() {
        let many: Vec<_> = (0..=limits::JWKS_KEYS).map(|n| ED.replace("\"ed\"", &format!("\"{n}\""))).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert_eq!(parse(set(&many).as_bytes()).expect("parses").len(), limits::JWKS_KEYS);
    }

    #[tokio::test]
    async fn a_new_key_is_found_after_the_minimum_interval_and_old_ones_expire() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("keys.json");
        std::fs::write(&path, set(&[ED])).expect("writes");
        let clock = ManualClock::new(UnixMillis(1_000_000));
        let keys = KeySet::new(Source::File(path.clone()), Arc::new(clock.clone()));
        assert!(matches!(keys.find(Some("ed"), RealmAlgorithm::EdDSA).await, Lookup::Found(_)), "read on first use");
        assert!(matches!(keys.find(None, RealmAlgorithm::EdDSA).await, Lookup::Found(_)), "the only one");
        assert!(matches!(keys.find(Some("ed"), RealmAlgorithm::RS256).await, Lookup::Unknown), "for its own algorithm only");

        std::fs::write(&path, set(&[EC])).expect("writes");
        assert!(matches!(keys.find(Some("ec"), RealmAlgorithm::ES256).await, Lookup::Unknown), "too soon to look again");
        clock.advance(limits::JWKS_REFRESH_MIN_MS);
        assert!(matches!(keys.find(Some("ec"), RealmAlgorithm::ES256).await, Lookup::Found(_)));
        assert!(matches!(keys.find(Some("ed"), RealmAlgorithm::EdDSA).await, Lookup::Unknown), "rotated away");

        std::fs::remove_file(&path).expect("removes");
        clock.advance(limits::JWKS_STALE_MAX_MS);
        assert!(keys.refresh().await.is_err());
        assert!(matches!(keys.find(Some("ec"), RealmAlgorithm::ES256).await, Lookup::Found(_)), "a failing source costs nothing yet");
        clock.advance(limits::JWKS_REFRESH_MIN_MS);
        assert!(matches!(keys.find(Some("ec"), RealmAlgorithm::ES256).await, Lookup::Unavailable), "but not for ever");
    }
}
