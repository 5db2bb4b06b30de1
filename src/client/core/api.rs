//! The HTTP API as a client sees it: JSON types, and typed calls over an [`Http`] that only moves bytes.

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::repair::Answer;
use super::signal::{Bundle, Ciphertext};
use crate::ids::{AccountId, ClientMessageId, DeviceId, Identity, RegistrationId};
use crate::wire::stream::Code;

/// Bytes that are base64 (RFC 4648 section 4, padded) in JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct B64(pub Vec<u8>);

impl From<Vec<u8>> for B64 {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl Serialize for B64 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for B64 {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// A method of HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "their names are HTTP's")]
pub enum Method {
    Get,
    Post,
    Put,
    Patch,
    Delete,
}

/// A request to the server.
#[derive(Clone)]
pub struct HttpRequest {
    /// Its method.
    pub method: Method,
    /// Path and query, from the `/v1/…` on.
    pub path: String,
    /// The device credential, for the `Authorization: Bearer` header.
    pub credential: Option<Zeroizing<String>>,
    /// A JSON body.
    pub body: Option<Vec<u8>>,
}

/// The server's answer.
#[derive(Debug, Clone)]
pub struct HttpResponse {
    /// The status.
    pub status: u16,
    /// The body, capped by the transport.
    pub body: Vec<u8>,
}

/// No answer came. A retry may help; whether the request had an effect is not known.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the server can't be reached: {0}")]
pub struct Unreachable(pub String);

/// Moves one request and its answer. Implemented by the platform: reqwest natively, `fetch` in a browser.
#[cfg_attr(target_family = "wasm", async_trait(?Send))]
#[cfg_attr(not(target_family = "wasm"), async_trait)]
pub trait Http {
    /// Sends the request and waits for the answer, within the transport's own time limit.
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, Unreachable>;
}

/// Why a call did not work.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApiError {
    /// A retry may help.
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    /// The server said no; its code says whether a retry can help.
    #[error("the server refused: {message} ({code:?})")]
    Refused {
        /// The public code.
        code: Code,
        /// For a person who reads logs.
        message: String,
        /// All that the answer said.
        answer: Answer,
    },
    /// The answer is not what the API promises. Another version, or not a Sealpost server.
    #[error("the server's answer is not understood: {0}")]
    NotUnderstood(String),
}

impl ApiError {
    /// The server's code, if it answered with one.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Whether the same call may work later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            Self::Refused { code, .. } => {
                matches!(code, Code::RateLimited | Code::Unavailable | Code::OutcomeUnknown | Code::InboxFull | Code::Internal)
            }
            Self::NotUnderstood(_) => false,
        }
    }

    /// As the answer to a send.
    pub fn into_answer(self) -> Answer {
        match self {
            Self::Refused { answer, .. } => answer,
            Self::Unreachable(_) => Answer::of(Code::OutcomeUnknown),
            Self::NotUnderstood(_) => Answer::of(Code::Internal),
        }
    }
}

/// A public key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicKeyJson {
    /// The client's number for it.
    pub id: u32,
    /// libsignal's serialization.
    pub public_key: B64,
}

/// A public key signed by the identity key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedKeyJson {
    /// The client's number for it.
    pub id: u32,
    /// libsignal's serialization.
    pub public_key: B64,
    /// XEdDSA over exactly those bytes.
    pub signature: B64,
}

/// Body of `PUT /v1/keys`, and the keys of `POST /v1/devices`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadKeys {
    /// A new signed prekey.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signed_prekey: Option<SignedKeyJson>,
    /// A new last-resort key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pq_last_resort_prekey: Option<SignedKeyJson>,
    /// More one-time keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub one_time_prekeys: Vec<PublicKeyJson>,
    /// More one-time Kyber keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pq_one_time_prekeys: Vec<SignedKeyJson>,
}

/// Body of `POST /v1/devices`.
#[derive(Clone, Serialize)]
pub struct RegisterDevice {
    /// Realm tokens; the first decides the account.
    pub tokens: Vec<String>,
    /// The device's name.
    pub name: String,
    /// See there.
    pub registration_id: RegistrationId,
    /// 32 random bytes, kept before the call: a repeat after a lost answer gets the same device.
    pub credential_secret: B64,
    /// 33 bytes.
    pub identity_key: B64,
    /// Its prekeys.
    #[serde(flatten)]
    pub keys: UploadKeys,
}

/// Answer of `POST /v1/devices`.
#[derive(Deserialize)]
pub struct Registered {
    /// The account.
    pub account_id: AccountId,
    /// The device in it.
    pub device_id: DeviceId,
    /// The secret every further request carries.
    #[serde(deserialize_with = "secret")]
    pub credential: Zeroizing<String>,
    /// Where its client message ids begin. A server that does not say reuses no device numbers.
    #[serde(default)]
    pub first_message_id: u64,
    /// The account's identities.
    pub identities: Vec<Identity>,
}

fn secret<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Zeroizing<String>, D::Error> {
    String::deserialize(deserializer).map(Zeroizing::new)
}

/// One of one's own devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnDevice {
    /// Its number.
    pub device_id: DeviceId,
    /// Its name.
    pub name: String,
    /// Its registration id.
    pub registration_id: RegistrationId,
    /// Its identity key.
    pub identity_key: B64,
    /// When it was registered.
    pub created_ms: u64,
}

/// Answer of `GET /v1/account`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnAccount {
    /// The account.
    pub account_id: AccountId,
    /// The device that asks.
    pub device_id: DeviceId,
    /// Its identities.
    pub identities: Vec<Identity>,
    /// Its devices.
    pub devices: Vec<OwnDevice>,
}

/// A device of somebody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerDevice {
    /// Its number.
    pub device_id: DeviceId,
    /// Its registration id.
    pub registration_id: RegistrationId,
    /// Its identity key.
    pub identity_key: B64,
}

/// Answer of `GET /v1/identities/…` and `GET /v1/accounts/…`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAccount {
    /// The account.
    pub account_id: AccountId,
    /// Its devices.
    pub devices: Vec<PeerDevice>,
}

#[derive(Deserialize)]
struct BundleJson {
    device_id: DeviceId,
    registration_id: RegistrationId,
    identity_key: B64,
    signed_prekey: SignedKeyJson,
    pq_prekey: SignedKeyJson,
    one_time_prekey: Option<PublicKeyJson>,
}

#[derive(Deserialize)]
struct Bundles {
    devices: Vec<BundleJson>,
}

impl From<BundleJson> for Bundle {
    fn from(json: BundleJson) -> Self {
        let signed = |key: SignedKeyJson| (key.id, key.public_key.0, key.signature.0);
        Self {
            device: json.device_id,
            registration_id: json.registration_id,
            identity_key: json.identity_key.0,
            signed_prekey: signed(json.signed_prekey),
            kyber_prekey: signed(json.pq_prekey),
            one_time_prekey: json.one_time_prekey.map(|key| (key.id, key.public_key.0)),
        }
    }
}

/// How many one-time keys the server has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyCounts {
    /// EC.
    pub one_time_prekeys: usize,
    /// Kyber.
    pub pq_one_time_prekeys: usize,
}

#[derive(Serialize)]
struct EnvelopeJson<'a> {
    device_id: DeviceId,
    registration_id: RegistrationId,
    r#type: u8,
    content: &'a B64,
}

#[derive(Serialize)]
struct SendJson<'a> {
    client_message_id: ClientMessageId,
    urgent: bool,
    ephemeral: bool,
    envelopes: Vec<EnvelopeJson<'a>>,
}

#[derive(Deserialize)]
struct ErrorJson {
    code: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    missing_devices: Vec<DeviceId>,
    #[serde(default)]
    extra_devices: Vec<DeviceId>,
    #[serde(default)]
    stale_devices: Vec<DeviceId>,
    #[serde(default)]
    retry_after_ms: Option<u64>,
}

/// One device's typed calls.
#[derive(Clone)]
pub struct Api<H> {
    http: H,
    credential: Option<Zeroizing<String>>,
}

impl<H: Http> Api<H> {
    /// Calls over this transport; without a credential only what needs none.
    pub fn new(http: H, credential: Option<Zeroizing<String>>) -> Self {
        Self { http, credential }
    }

    /// Registers a device.
    pub async fn register(&self, device: &RegisterDevice) -> Result<Registered, ApiError> {
        self.call(Method::Post, "/v1/devices".into(), Some(json(device)?)).await
    }

    /// A realm token for an identity; only where the server runs in development mode.
    pub async fn dev_token(&self, identity: &Identity) -> Result<String, ApiError> {
        #[derive(Deserialize)]
        struct Token {
            token: String,
        }
        let body = json(&serde_json::json!({ "identity": identity }))?;
        Ok(self.call::<Token>(Method::Post, "/v1/dev/token".into(), Some(body)).await?.token)
    }

    /// One's own account.
    pub async fn account(&self) -> Result<OwnAccount, ApiError> {
        self.call(Method::Get, "/v1/account".into(), None).await
    }

    /// Links another identity to one's account.
    pub async fn link_identity(&self, token: &str) -> Result<OwnAccount, ApiError> {
        self.call(Method::Post, "/v1/account/identities".into(), Some(json(&serde_json::json!({ "token": token }))?)).await
    }

    /// Takes an identity off one's account.
    pub async fn unlink_identity(&self, identity: &Identity) -> Result<(), ApiError> {
        self.done(Method::Delete, format!("/v1/account/identities/{}", escape(&identity.to_string())), None).await
    }

    /// Ends one's account.
    pub async fn delete_account(&self) -> Result<(), ApiError> {
        self.done(Method::Delete, "/v1/account".into(), None).await
    }

    /// Renames one of one's devices.
    pub async fn rename_device(&self, device: DeviceId, name: &str) -> Result<(), ApiError> {
        self.done(Method::Patch, format!("/v1/devices/{device}"), Some(json(&serde_json::json!({ "name": name }))?)).await
    }

    /// Revokes one of one's devices.
    pub async fn revoke_device(&self, device: DeviceId) -> Result<(), ApiError> {
        self.done(Method::Delete, format!("/v1/devices/{device}"), None).await
    }

    /// Accounts that are blocked.
    pub async fn blocks(&self) -> Result<Vec<AccountId>, ApiError> {
        #[derive(Deserialize)]
        struct Blocks {
            accounts: Vec<AccountId>,
        }
        Ok(self.call::<Blocks>(Method::Get, "/v1/blocks".into(), None).await?.accounts)
    }

    /// Refuses messages of an account, or takes that back.
    pub async fn block(&self, account: AccountId, blocked: bool) -> Result<(), ApiError> {
        self.done(if blocked { Method::Put } else { Method::Delete }, format!("/v1/blocks/{account}"), None).await
    }

    /// Publishes keys.
    pub async fn upload_keys(&self, keys: &UploadKeys) -> Result<KeyCounts, ApiError> {
        self.call(Method::Put, "/v1/keys".into(), Some(json(keys)?)).await
    }

    /// How many one-time keys are left.
    pub async fn key_counts(&self) -> Result<KeyCounts, ApiError> {
        self.call(Method::Get, "/v1/keys".into(), None).await
    }

    /// Who an identity is.
    pub async fn resolve(&self, identity: &Identity) -> Result<PeerAccount, ApiError> {
        self.call(Method::Get, format!("/v1/identities/{}", escape(&identity.to_string())), None).await
    }

    /// An account's devices.
    pub async fn peer(&self, account: AccountId) -> Result<PeerAccount, ApiError> {
        self.call(Method::Get, format!("/v1/accounts/{account}"), None).await
    }

    /// Key bundles of an account's devices, or of one. Uses up one-time keys: ask for what is needed only.
    pub async fn bundles(&self, account: AccountId, device: Option<DeviceId>) -> Result<Vec<Bundle>, ApiError> {
        let query = device.map(|device| format!("?device_id={device}")).unwrap_or_default();
        let bundles: Bundles = self.call(Method::Get, format!("/v1/accounts/{account}/keys{query}"), None).await?;
        Ok(bundles.devices.into_iter().map(Bundle::from).collect())
    }

    /// Sends one message over plain HTTP.
    pub async fn send(
        &self,
        to: AccountId,
        id: ClientMessageId,
        urgent: bool,
        ephemeral: bool,
        envelopes: &[(DeviceId, Ciphertext)],
    ) -> Result<(), ApiError> {
        let contents: Vec<B64> = envelopes.iter().map(|(_, ciphertext)| B64(ciphertext.bytes.clone())).collect();
        let envelopes = envelopes.iter().zip(&contents).map(|((device_id, ciphertext), content)| EnvelopeJson {
            device_id: *device_id,
            registration_id: ciphertext.registration_id,
            r#type: ciphertext.kind,
            content,
        });
        let body = SendJson { client_message_id: id, urgent, ephemeral, envelopes: envelopes.collect() };
        self.done(Method::Post, format!("/v1/accounts/{to}/messages"), Some(json(&body)?)).await
    }

    pub(super) async fn call<T: DeserializeOwned>(&self, method: Method, path: String, body: Option<Vec<u8>>) -> Result<T, ApiError> {
        let bytes = self.exchange(method, path, body).await?;
        serde_json::from_slice(&bytes).map_err(|error| ApiError::NotUnderstood(error.to_string()))
    }

    pub(super) async fn done(&self, method: Method, path: String, body: Option<Vec<u8>>) -> Result<(), ApiError> {
        self.exchange(method, path, body).await.map(|_| ())
    }

    pub(super) async fn exchange(&self, method: Method, path: String, body: Option<Vec<u8>>) -> Result<Vec<u8>, ApiError> {
        let response = self.http.call(HttpRequest { method, path, credential: self.credential.clone(), body }).await?;
        if (200..300).contains(&response.status) { Ok(response.body) } else { Err(refusal(&response)) }
    }
}

pub(super) fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(value).map_err(|error| ApiError::NotUnderstood(error.to_string()))
}

fn refusal(response: &HttpResponse) -> ApiError {
    let Ok(error) = serde_json::from_slice::<ErrorJson>(&response.body) else { return proxy_refusal(response.status) };
    let Some(code) = Code::from_str_name(&error.code.to_ascii_uppercase()) else {
        return ApiError::NotUnderstood(format!("status {} with an unknown code", response.status));
    };
    let answer = Answer {
        code,
        missing: error.missing_devices,
        extra: error.extra_devices,
        stale: error.stale_devices,
        retry_after_ms: error.retry_after_ms.unwrap_or_default(),
    };
    ApiError::Refused { code, message: error.message, answer }
}

/// Something between us and the server answered (a proxy while the server is away): passing trouble, unless it says otherwise.
fn proxy_refusal(status: u16) -> ApiError {
    match status {
        429 | 502..=504 => ApiError::Unreachable(Unreachable(format!("status {status}"))),
        _ => ApiError::NotUnderstood(format!("status {status}")),
    }
}

/// Percent-encodes a path segment (RFC 3986: all but unreserved characters, and `@`, which is allowed there).
fn escape(segment: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'@');
    segment.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_keep_what_the_server_said() {
        let body = br#"{"code":"device_mismatch","message":"m","missing_devices":[2],"extra_devices":[3],"retry_after_ms":5}"#;
        let error = refusal(&HttpResponse { status: 409, body: body.to_vec() });
        let answer = error.clone().into_answer();
        assert_eq!(error.code(), Some(Code::DeviceMismatch));
        assert_eq!((answer.missing.len(), answer.extra.len(), answer.stale.len(), answer.retry_after_ms), (1, 1, 0, 5));
        let proxy = refusal(&HttpResponse { status: 502, body: b"<html>".to_vec() });
        assert!(proxy.is_transient());
        assert!(!refusal(&HttpResponse { status: 404, body: b"<html>".to_vec() }).is_transient());
    }

    #[test]
    fn path_segments_are_escaped() {
        assert_eq!(escape("alice@socialink"), "alice@socialink");
        assert_eq!(escape("a?b#c%ä@x"), "a%3Fb%23c%25%C3%A4@x");
    }

    #[test]
    fn registration_is_flat_json() {
        let keys = UploadKeys { one_time_prekeys: vec![PublicKeyJson { id: 1, public_key: vec![5].into() }], ..UploadKeys::default() };
        let registration_id = RegistrationId::new(7).expect("valid");
        let (tokens, name) = (vec!["t".into()], "n".to_owned());
        let (credential_secret, identity_key) = (vec![0; 3].into(), vec![1].into());
        let body = RegisterDevice { tokens, name, registration_id, credential_secret, identity_key, keys };
        let value = serde_json::to_value(&body).expect("json");
        assert_eq!(value["credential_secret"], "AAAA");
        assert_eq!(value["one_time_prekeys"][0]["public_key"], "BQ==");
        assert_eq!(value["registration_id"], 7);
    }
}
