//! A broker in this process on a free port, devices with real keys, and requests as a client in any language makes them.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use libsignal_protocol::{IdentityKeyPair, KeyPair, kem};
use reqwest::{Method, StatusCode};
use sealpost::config::{Config, Role};
use sealpost::server::Broker;
use sealpost::testing::cluster::TestCluster;
use serde_json::{Value, json};
use tempfile::TempDir;

pub struct TestBroker {
    pub dir: Arc<TempDir>,
    pub broker: Broker,
    pub http: reqwest::Client,
}

pub fn b64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

pub fn unb64(value: &Value) -> Vec<u8> {
    STANDARD.decode(value.as_str().expect("a text")).expect("base64")
}

pub fn config(data: &Path, more: &str) -> Config {
    let mut config: Config = toml::from_str(more).expect("the test's configuration parses");
    config.data = data.to_owned();
    config.listen = "127.0.0.1:0".parse().expect("an address");
    config
}

impl TestBroker {
    /// In development mode, with defaults.
    pub async fn start() -> Self {
        Self::with("").await
    }

    pub async fn with(more: &str) -> Self {
        let dir = Arc::new(tempfile::tempdir().expect("a folder"));
        Self::in_folder(dir, more).await
    }

    pub async fn in_folder(dir: Arc<TempDir>, more: &str) -> Self {
        let mut config = config(dir.path(), more);
        if let Some(cluster) = TestCluster::of_folder(dir.path()).await.expect("the cluster makes topics and keyspaces") {
            cluster.join(&mut config, Role::All);
        }
        let broker = Broker::start(config).await.expect("the broker starts");
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().build().expect("a client");
        Self { dir, broker, http }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.broker.url())
    }

    pub async fn call(&self, method: Method, path: &str, credential: Option<&str>, body: Option<Value>) -> Answer {
        let mut request = self.http.request(method, self.url(path));
        if let Some(credential) = credential {
            request = request.bearer_auth(credential);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        Answer::of(request.send().await.expect("an answer")).await
    }

    pub async fn dev_token(&self, identity: &str) -> String {
        let answer = self.call(Method::POST, "/v1/dev/token", None, Some(json!({ "identity": identity }))).await;
        answer.expect(StatusCode::OK).body["token"].as_str().expect("a token").to_owned()
    }

    pub async fn register(&self, identity: &str) -> Device {
        self.register_with(identity, 3).await
    }

    /// With so many one-time prekeys of each kind.
    pub async fn register_with(&self, identity: &str, one_time: u32) -> Device {
        let token = self.dev_token(identity).await;
        let keys = Keys::new(one_time);
        let answer = self.call(Method::POST, "/v1/devices", None, Some(keys.registration(&[&token]))).await.expect(StatusCode::CREATED);
        Device {
            account: answer.body["account_id"].as_str().expect("an account").to_owned(),
            id: answer.body["device_id"].as_u64().expect("a device") as u32,
            credential: answer.body["credential"].as_str().expect("a credential").to_owned(),
            keys,
        }
    }

    pub async fn get(&self, device: &Device, path: &str) -> Answer {
        self.call(Method::GET, path, Some(&device.credential), None).await
    }

    pub async fn put(&self, device: &Device, path: &str, body: Value) -> Answer {
        self.call(Method::PUT, path, Some(&device.credential), Some(body)).await
    }

    pub async fn post(&self, device: &Device, path: &str, body: Value) -> Answer {
        self.call(Method::POST, path, Some(&device.credential), Some(body)).await
    }

    pub async fn delete(&self, device: &Device, path: &str) -> Answer {
        self.call(Method::DELETE, path, Some(&device.credential), None).await
    }

    pub async fn send(&self, from: &Device, to: &[&Device], id: u64, content: &[u8]) -> Answer {
        let envelopes: Vec<_> = to.iter().map(|device| device.envelope(content)).collect();
        let path = format!("/v1/accounts/{}/messages", to[0].account);
        self.post(from, &path, json!({ "client_message_id": id, "envelopes": envelopes })).await
    }

    pub async fn stop(self) -> Arc<TempDir> {
        self.broker.stop().await;
        self.dir
    }
}

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub body: Value,
    pub text: String,
}

impl Answer {
    pub async fn of(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.expect("a body");
        Self { status, headers, body: serde_json::from_str(&text).unwrap_or(Value::Null), text }
    }

    #[track_caller]
    pub fn expect(self, status: StatusCode) -> Self {
        assert_eq!(self.status, status, "{}", self.text);
        self
    }

    /// An error answer with this code, in the documented shape.
    #[track_caller]
    pub fn refused(self, status: u16, code: &str) -> Self {
        assert_eq!((self.status.as_u16(), self.body["code"].as_str()), (status, Some(code)), "{}", self.text);
        assert!(self.body["message"].is_string(), "{}", self.text);
        if matches!(status, 429 | 503) {
            let wait = self.headers.get("retry-after").and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
            assert_eq!(wait, self.body["retry_after_ms"].as_u64().map(|ms| ms.div_ceil(1_000)), "it says when to come back");
            assert!(wait.is_some_and(|seconds| seconds > 0), "{}", self.text);
        }
        self
    }
}

pub struct Device {
    pub account: String,
    pub id: u32,
    pub credential: String,
    pub keys: Keys,
}

impl Device {
    pub fn envelope(&self, content: &[u8]) -> Value {
        json!({ "device_id": self.id, "registration_id": self.keys.registration_id, "type": 2, "content": b64(content) })
    }
}

/// A device's keys, and what of them is public.
pub struct Keys {
    pub identity: IdentityKeyPair,
    pub registration_id: u32,
    pub one_time: u32,
}

impl Keys {
    pub fn new(one_time: u32) -> Self {
        let mut rng = rand::rng();
        Self { identity: IdentityKeyPair::generate(&mut rng), registration_id: rand::Rng::random_range(&mut rng, 1..=16_380), one_time }
    }

    pub fn sign(&self, bytes: &[u8]) -> String {
        b64(&self.identity.private_key().calculate_signature(bytes, &mut rand::rng()).expect("signs"))
    }

    pub fn ec(id: u32) -> Value {
        json!({ "id": id, "public_key": b64(&KeyPair::generate(&mut rand::rng()).public_key.serialize()) })
    }

    pub fn signed_ec(&self, id: u32) -> Value {
        let key = KeyPair::generate(&mut rand::rng()).public_key.serialize();
        json!({ "id": id, "public_key": b64(&key), "signature": self.sign(&key) })
    }

    pub fn signed_pq(&self, id: u32) -> Value {
        let key = kem::KeyPair::generate(kem::KeyType::Kyber1024, &mut rand::rng()).public_key.serialize();
        json!({ "id": id, "public_key": b64(&key), "signature": self.sign(&key) })
    }

    pub fn registration(&self, tokens: &[&str]) -> Value {
        json!({
            "tokens": tokens,
            "name": "Test",
            "registration_id": self.registration_id,
            "identity_key": b64(&self.identity.identity_key().serialize()),
            "signed_prekey": self.signed_ec(1),
            "pq_last_resort_prekey": self.signed_pq(1),
            "one_time_prekeys": (0..self.one_time).map(|n| Self::ec(100 + n)).collect::<Vec<_>>(),
            "pq_one_time_prekeys": (0..self.one_time).map(|n| self.signed_pq(200 + n)).collect::<Vec<_>>(),
        })
    }
}
