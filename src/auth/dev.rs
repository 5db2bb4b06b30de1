//! Development mode: three realms whose tokens one local key signs, so that a newcomer needs no identity provider.
//! Whoever can read the key is everybody, so it exists only while development mode is on.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::jwks::{self, JwksError, RealmKey};
use crate::clock::{Random, UnixMillis};
use crate::ids::{Identity, RealmId};

/// Why there is no development realm, or no token of it.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// Development mode was never on for this folder, or is off now.
    #[error(
        "there is no development key in {0}: development tokens exist only for a broker that runs in development mode \
         (`sealpost serve --dev --data {0}`)"
    )]
    Off(PathBuf),
    /// The key file can't be read or written.
    #[error("the development key {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a development key.
    #[error("{0} is not a development key; remove it and start the broker again")]
    Damaged(PathBuf),
    /// The realm is not one of the development ones.
    #[error("development tokens are only for the realms socialink, vignette and local")]
    NotADevRealm,
    /// The key can't sign.
    #[error("the development key can't sign: {0}")]
    Sign(String),
}

/// The key of the development realms.
pub struct DevRealm {
    seed: Zeroizing<[u8; 32]>,
    public: [u8; 32],
    kid: String,
}

impl std::fmt::Debug for DevRealm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DevRealm").field("kid", &self.kid).finish_non_exhaustive()
    }
}

#[derive(Serialize)]
struct Claims<'a> {
    iss: String,
    aud: &'a str,
    sub: &'a str,
    iat: u64,
    exp: u64,
}

/// PKCS#8 (RFC 8410) of an Ed25519 key: this, then the seed.
const PKCS8_PREFIX: [u8; 16] = [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

impl DevRealm {
    /// What the tokens carry as `aud`.
    pub const AUDIENCE: &'static str = "sealpost";

    /// The development realms.
    pub fn names() -> impl Iterator<Item = RealmId> {
        ["socialink", "vignette", "local"].into_iter().filter_map(|name| name.parse().ok())
    }

    /// What a development realm's tokens carry as `iss`.
    pub fn issuer(realm: &RealmId) -> String {
        format!("sealpost-dev:{realm}")
    }

    fn path(data: &Path) -> PathBuf {
        data.join("dev-realm.key")
    }

    /// The key of this data folder; made if there is none. Only a broker in development mode calls this.
    pub fn open(data: &Path, random: &dyn Random) -> Result<Self, DevError> {
        match Self::load(data) {
            Err(DevError::Off(_)) => {}
            outcome => return outcome,
        }
        let path = Self::path(data);
        let mut seed = Zeroizing::new([0; 32]);
        random.fill(&mut *seed);
        let text = Zeroizing::new(format!("{}\n", URL_SAFE_NO_PAD.encode(*seed)));
        let write = || {
            std::fs::create_dir_all(data)?;
            let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write().map_err(|source| DevError::Io { path: path.clone(), source })?;
        Self::from_seed(seed).ok_or(DevError::Damaged(path))
    }

    /// The key of this data folder, if its broker is in development mode.
    pub fn load(data: &Path) -> Result<Self, DevError> {
        let path = Self::path(data);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => Zeroizing::new(text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(DevError::Off(data.into())),
            Err(source) => return Err(DevError::Io { path, source }),
        };
        let mut seed = Zeroizing::new([0; 32]);
        let length = URL_SAFE_NO_PAD.decode_slice(text.trim_end(), &mut *seed);
        if !matches!(length, Ok(32)) {
            return Err(DevError::Damaged(path));
        }
        Self::from_seed(seed).ok_or(DevError::Damaged(path))
    }

    /// Removes the key: called when a broker starts without development mode, so that `sealpost token` is refused from then on.
    pub fn remove(data: &Path) -> Result<(), DevError> {
        let path = Self::path(data);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(DevError::Io { path, source }),
            _ => Ok(()),
        }
    }

    fn from_seed(seed: Zeroizing<[u8; 32]>) -> Option<Self> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&*seed).ok()?;
        let public: [u8; 32] = pair.public_key().as_ref().try_into().ok()?;
        let kid = format!("dev-{}", URL_SAFE_NO_PAD.encode(&Sha256::digest(public)[..6]));
        Some(Self { seed, public, kid })
    }

    /// The public half, as a realm's key.
    pub fn public(&self) -> Result<RealmKey, JwksError> {
        let x = URL_SAFE_NO_PAD.encode(self.public);
        let set = format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","alg":"EdDSA","kid":"{}","x":"{x}"}}]}}"#, self.kid);
        jwks::parse(set.as_bytes())?.pop().ok_or_else(|| JwksError::Malformed("the development key".to_owned()))
    }

    /// A token for an identity of a development realm, valid from now on for so long.
    pub fn sign(&self, identity: &Identity, now: UnixMillis, ttl_ms: u64) -> Result<String, DevError> {
        if !Self::names().any(|name| name == *identity.realm()) {
            return Err(DevError::NotADevRealm);
        }
        let iat = now.0 / 1000;
        let claims = Claims {
            iss: Self::issuer(identity.realm()),
            aud: Self::AUDIENCE,
            sub: identity.user(),
            iat,
            exp: now.plus(ttl_ms).0.div_ceil(1000),
        };
        let mut header = Header::new(Algorithm::EdDSA);
        header.kid = Some(self.kid.clone());
        let der = Zeroizing::new([PKCS8_PREFIX.as_slice(), &*self.seed].concat());
        jsonwebtoken::encode(&header, &claims, &EncodingKey::from_ed_der(&der)).map_err(|e| DevError::Sign(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::clock::SeededRandom;

    #[test]
    fn the_key_is_made_once_kept_private_and_removed() {
        let dir = tempfile::tempdir().expect("a folder");
        let error = DevRealm::load(dir.path()).expect_err("there is none");
        assert!(error.to_string().contains("sealpost serve --dev"), "{error}");
        let made = DevRealm::open(dir.path(), &SeededRandom::new(1)).expect("made");
        let mode = std::fs::metadata(DevRealm::path(dir.path())).expect("exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = DevRealm::open(dir.path(), &SeededRandom::new(2)).expect("opened");
        assert_eq!((made.kid, made.public), (again.kid.clone(), again.public));
        assert!(!format!("{again:?}").contains(&URL_SAFE_NO_PAD.encode(*again.seed)));
        DevRealm::remove(dir.path()).expect("removed");
        DevRealm::remove(dir.path()).expect("nothing to do");
        assert!(matches!(DevRealm::load(dir.path()), Err(DevError::Off(_))));
    }

    #[test]
    fn damaged_keys_and_other_realms_are_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let dev = DevRealm::open(dir.path(), &SeededRandom::new(1)).expect("made");
        assert!(matches!(dev.sign(&"a@elsewhere".parse().expect("valid"), UnixMillis(0), 1), Err(DevError::NotADevRealm)));
        std::fs::write(DevRealm::path(dir.path()), "short").expect("writes");
        assert!(matches!(DevRealm::open(dir.path(), &SeededRandom::new(1)), Err(DevError::Damaged(_))));
    }
}
