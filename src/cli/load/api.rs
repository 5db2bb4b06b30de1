//! The part of the HTTP API that a load run needs around its traffic: tokens, registration, keys, metrics.

use std::time::Duration;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::keys::{Keyset, REGISTRATION_ID};
use super::wire::Target;
use crate::client::PrivateCa;

/// How long a call is repeated while the server is away or tells us to wait.
const PATIENCE: Duration = Duration::from_secs(60);
/// Registrations at once: enough that the server commits them in groups.
const REGISTRATIONS_AT_ONCE: usize = 48;

/// One device that a run registered.
#[derive(Clone)]
pub struct Registered {
    /// Where to send to it.
    pub target: Target,
    /// Its account, as the API writes it.
    pub account_id: String,
    /// Its bearer credential.
    pub credential: String,
}

/// A connection pool to one server.
#[derive(Clone)]
pub struct Api {
    http: reqwest::Client,
    base: String,
    /// Makes the user names of this run its own.
    run: String,
}

/// An answer of the API.
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// From its Retry-After.
    pub retry_after: Option<Duration>,
    /// Its JSON body; null if it is none.
    pub body: Value,
}

impl Api {
    /// For a server's base URL; over TLS with the authority that vouches for it.
    pub fn new(server: &url::Url, ca: Option<&PrivateCa>) -> anyhow::Result<Self> {
        if !matches!((server.scheme(), ca), ("http", _) | ("https", Some(_))) {
            bail!(
                "the load tool speaks plain http, or https with --ca FILE: the certificates of the authority that vouches for the broker"
            );
        }
        // Fails if one is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = reqwest::Client::builder().no_proxy().tcp_nodelay(true).timeout(Duration::from_secs(90));
        let builder = match ca {
            Some(ca) => builder.tls_backend_preconfigured(rustls::ClientConfig::clone(&ca.config())),
            None => builder,
        };
        let http = builder.build()?;
        let mut run = [0u8; 5];
        crate::clock::Random::fill(&crate::clock::SystemRandom, &mut run);
        let run = run.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { http, base: server.as_str().trim_end_matches('/').to_owned(), run })
    }

    /// One request, one answer; an error is a failed connection.
    pub async fn call(&self, method: Method, path: &str, credential: Option<&str>, body: Option<&Value>) -> reqwest::Result<Answer> {
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if let Some(credential) = credential {
            request = request.bearer_auth(credential);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await?;
        let status = response.status();
        let after = response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        let bytes = response.bytes().await?;
        let body: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        let precise = body["retry_after_ms"].as_u64().map(Duration::from_millis);
        Ok(Answer { status, retry_after: precise.or(after.map(Duration::from_secs)), body })
    }

    /// Repeats a call while the server is away or says "later"; any other refusal is an error.
    pub async fn insist(&self, method: Method, path: &str, credential: Option<&str>, body: Option<&Value>) -> anyhow::Result<Value> {
        let until = Instant::now() + PATIENCE;
        loop {
            let pause = match self.call(method.clone(), path, credential, body).await {
                Ok(answer) if answer.status.is_success() => return Ok(answer.body),
                Ok(answer) => match answer.status {
                    StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE if Instant::now() < until => {
                        answer.retry_after.unwrap_or(Duration::from_millis(200)).min(Duration::from_secs(5))
                    }
                    status => bail!("{method} {path} was answered with {status}: {}", answer.body),
                },
                Err(error) if Instant::now() >= until => return Err(error).with_context(|| format!("no answer from {}", self.base)),
                Err(_) => Duration::from_millis(100),
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// The bytes at a path, while it says "later" or is away.
    pub async fn insist_bytes(&self, path: &str, credential: &str) -> anyhow::Result<Vec<u8>> {
        let until = Instant::now() + PATIENCE;
        loop {
            let answer = match self.http.get(format!("{}{path}", self.base)).bearer_auth(credential).send().await {
                Ok(answer) => answer.error_for_status(),
                Err(error) => Err(error),
            };
            match answer {
                Ok(answer) => return Ok(answer.bytes().await?.into()),
                Err(error) if error.status().is_some_and(|status| status.is_client_error()) || Instant::now() > until => {
                    return Err(error).with_context(|| format!("{path} could not be fetched"));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Waits until the server takes requests.
    pub async fn ready(&self) -> anyhow::Result<Value> {
        self.insist(Method::GET, "/v1/server", None, None).await
    }

    /// A development token for a user of the realm `local`.
    async fn token(&self, user: &str) -> anyhow::Result<String> {
        let body = json!({"identity": format!("{user}@local")});
        let answer = self
            .insist(Method::POST, "/v1/dev/token", None, Some(&body))
            .await
            .context("the load tool registers its own devices with development tokens: start the server with --dev")?;
        Ok(answer["token"].as_str().context("no token in the answer")?.to_owned())
    }

    /// An account with this many devices.
    async fn register_account(&self, name: &str, devices: usize, keys: &Value) -> anyhow::Result<Vec<Registered>> {
        let (user, first) = self.register(name, keys).await?;
        let mut found = vec![first];
        while found.len() < devices {
            // Once only: after an unknown outcome the account could have a device that nobody reads.
            let mut body = keys.clone();
            body["tokens"] = json!([self.token(&user).await?]);
            let answer = self.call(Method::POST, "/v1/devices", None, Some(&body)).await?;
            if answer.status != StatusCode::CREATED {
                bail!("the registration of a further device was answered with {}: {}", answer.status, answer.body);
            }
            found.push(registered(&answer.body)?);
        }
        Ok(found)
    }

    /// A new account's user and device.
    async fn register(&self, name: &str, keys: &Value) -> anyhow::Result<(String, Registered)> {
        let until = Instant::now() + PATIENCE;
        for attempt in 0.. {
            // A new user for each attempt: one whose outcome is unknown may have made its account.
            let mut body = keys.clone();
            let user = format!("load-{}-{name}-{attempt}", self.run);
            body["tokens"] = json!([self.token(&user).await?]);
            let answer = match self.call(Method::POST, "/v1/devices", None, Some(&body)).await {
                Ok(answer) if answer.status == StatusCode::CREATED => return Ok((user, registered(&answer.body)?)),
                Ok(answer) if answer.status.is_client_error() && answer.status != StatusCode::TOO_MANY_REQUESTS => {
                    bail!("a registration was answered with {}: {}", answer.status, answer.body)
                }
                other => other,
            };
            if Instant::now() > until {
                bail!("registering took too long: {}", answer.map_or_else(|e| e.to_string(), |a| format!("{} {}", a.status, a.body)));
            }
            let pause = answer.ok().and_then(|answer| answer.retry_after).unwrap_or(Duration::from_millis(200));
            tokio::time::sleep(pause.min(Duration::from_secs(5))).await;
        }
        unreachable!("the loop ends by returning")
    }

    /// Registers this many accounts with so many devices each, which all publish the same keys; the devices come account by account.
    pub async fn register_many(
        &self,
        kind: &str,
        count: usize,
        devices: usize,
        keys: &Keyset,
        one_time: usize,
        progress: impl Fn(usize),
    ) -> anyhow::Result<Vec<Registered>> {
        let body = keys.registration(one_time)?;
        let (body, progress) = (&body, &progress);
        let mut found: Vec<(usize, Vec<Registered>)> = stream::iter(0..count)
            .map(|index| async move { anyhow::Ok((index, self.register_account(&format!("{kind}{index}"), devices, body).await?)) })
            .buffer_unordered(REGISTRATIONS_AT_ONCE)
            .enumerate()
            .map(|(done, result)| {
                progress((done + 1) * devices);
                result
            })
            .try_collect()
            .await?;
        found.sort_unstable_by_key(|(index, _)| *index);
        Ok(found.into_iter().flat_map(|(_, devices)| devices).collect())
    }

    /// Uploads one-time prekeys.
    pub async fn put_keys(&self, device: &Registered, keys: &Value) -> anyhow::Result<()> {
        self.insist(Method::PUT, "/v1/keys", Some(&device.credential), Some(keys)).await.map(drop)
    }

    /// An account's key bundle, insisting.
    pub async fn bundle(&self, asker: &Registered, of: &Registered) -> anyhow::Result<Value> {
        self.insist(Method::GET, &format!("/v1/accounts/{}/keys", of.account_id), Some(&asker.credential), None).await
    }

    /// Prometheus' text.
    pub async fn metrics(&self) -> reqwest::Result<String> {
        let request = self.http.get(format!("{}/metrics", self.base)).timeout(Duration::from_secs(5));
        request.send().await?.error_for_status()?.text().await
    }
}

fn registered(body: &Value) -> anyhow::Result<Registered> {
    let account_id = body["account_id"].as_str().context("no account_id in the answer")?;
    let device = body["device_id"].as_u64().context("no device_id in the answer")?;
    let account: crate::ids::AccountId = account_id.parse()?;
    Ok(Registered {
        target: Target { account: *account.as_bytes(), device: u32::try_from(device)?, registration: REGISTRATION_ID },
        account_id: account_id.to_owned(),
        credential: body["credential"].as_str().context("no credential in the answer")?.to_owned(),
    })
}

/// The body of `POST /v1/accounts/{account}/messages` for devices of that account.
pub fn send_body(targets: &[Target], id: u64, kind: u8, content: &[u8]) -> Value {
    let content = STANDARD.encode(content);
    let envelope = |target: &Target| {
        json!({
            "device_id": target.device,
            "registration_id": target.registration,
            "type": kind,
            "content": content,
        })
    };
    json!({
        "client_message_id": id,
        "envelopes": targets.iter().map(envelope).collect::<Vec<_>>(),
    })
}
