//! A platform: keys of every kind, tokens signed with them, and its key set on an HTTP address.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use parking_lot::Mutex;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
use rsa::pkcs1::EncodeRsaPrivateKey as _;
use rsa::traits::PublicKeyParts as _;
use serde_json::{Value, json};

/// A signing key of a platform.
pub struct SigningKey {
    pub kid: String,
    pub algorithm: Algorithm,
    pub private: EncodingKey,
    pub public: Value,
}

fn b64url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

impl SigningKey {
    pub fn eddsa(kid: &str) -> Self {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).expect("a key");
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).expect("a key");
        let public = json!({ "kty": "OKP", "crv": "Ed25519", "kid": kid, "x": b64url(pair.public_key().as_ref()) });
        Self { kid: kid.to_owned(), algorithm: Algorithm::EdDSA, private: EncodingKey::from_ed_der(pkcs8.as_ref()), public }
    }

    pub fn es256(kid: &str) -> Self {
        let random = ring::rand::SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).expect("a key");
        let point = pair.public_key().as_ref();
        let public =
            json!({ "kty": "EC", "crv": "P-256", "use": "sig", "kid": kid, "x": b64url(&point[1..33]), "y": b64url(&point[33..]) });
        Self { kid: kid.to_owned(), algorithm: Algorithm::ES256, private: EncodingKey::from_ec_der(pkcs8.as_ref()), public }
    }

    pub fn rs256(kid: &str, bits: usize) -> Self {
        let key = rsa::RsaPrivateKey::new(&mut rsa::rand_core::OsRng, bits).expect("a key");
        let der = key.to_pkcs1_der().expect("encodes");
        let public = json!({
            "kty": "RSA", "alg": "RS256", "kid": kid, "n": b64url(&key.n().to_bytes_be()), "e": b64url(&key.e().to_bytes_be()),
        });
        Self { kid: kid.to_owned(), algorithm: Algorithm::RS256, private: EncodingKey::from_rsa_der(der.as_bytes()), public }
    }

    pub fn sign(&self, claims: &Value) -> String {
        let mut header = Header::new(self.algorithm);
        header.kid = Some(self.kid.clone());
        jsonwebtoken::encode(&header, claims, &self.private).expect("signs")
    }
}

/// What every key set's address answers, and how often it was asked.
#[derive(Clone, Default)]
pub struct KeyServer {
    pub answer: Arc<Mutex<(u16, String)>>,
    pub asked: Arc<AtomicUsize>,
}

impl KeyServer {
    pub fn publish(&self, keys: &[&SigningKey]) {
        let keys: Vec<_> = keys.iter().map(|key| key.public.clone()).collect();
        *self.answer.lock() = (200, json!({ "keys": keys }).to_string());
    }

    pub fn fail(&self, status: u16) {
        *self.answer.lock() = (status, String::new());
    }

    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// Serves at `/keys` until the test's runtime ends.
    pub async fn serve(&self) -> SocketAddr {
        let this = self.clone();
        let answer = move || {
            this.asked.fetch_add(1, Ordering::SeqCst);
            let (status, body) = this.answer.lock().clone();
            async move { (StatusCode::from_u16(status).expect("a status"), body) }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let app = Router::new().route("/keys", get(answer));
        tokio::spawn(async move { axum::serve(listener, app).await });
        address
    }
}
