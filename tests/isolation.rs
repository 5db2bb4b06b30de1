//! G-ISOLATED: no request reads or changes what its device may not. Every operation of the OpenAPI document is tried, so
//! that a new one can't be forgotten.

mod support;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use support::{Answer, Device, Keys, TestBroker, b64};

/// A group's id.
const GROUP: &str = "8a6e0804-2bd0-4672-b79d-d97027f9071a";

/// An operation of the document, with parameters and body filled in for a victim.
struct Operation {
    method: Method,
    path: String,
    body: Option<Value>,
    private: bool,
}

impl std::fmt::Debug for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

async fn operations(broker: &TestBroker, victim: &Device, third: &Device) -> Vec<Operation> {
    let document = broker.call(Method::GET, "/openapi.json", None, None).await.expect(StatusCode::OK).body;
    let token = broker.dev_token("fresh@local").await;
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            let account = if path.contains("blocks") { &third.account } else { &victim.account };
            let filled = path
                .replace("{account_id}", account)
                .replace("{device_id}", &victim.id.to_string())
                .replace("{group_id}", GROUP)
                .replace("{epoch}", "0")
                .replace("{identity}", "victim@socialink");
            assert!(!filled.contains('{'), "{path} has a parameter that this test does not know: teach it");
            operations.push(Operation {
                method: method.to_uppercase().parse().expect("a method"),
                body: operation["requestBody"].is_object().then(|| body_of(method, path, victim, &token)),
                path: filled,
                private: operation["security"].is_array(),
            });
        }
    }
    assert!(operations.len() >= 34, "the document lists them all: {operations:?}");
    operations
}

/// A body that would be taken if the credential were right.
fn body_of(method: &str, path: &str, victim: &Device, token: &str) -> Value {
    match (method, path) {
        ("post", "/v1/devices") => Keys::new(0).registration(&["not.a.token"]),
        ("post", "/v1/dev/token") => json!({ "identity": "x@elsewhere" }),
        ("post", "/v1/account/identities") => json!({ "token": token }),
        ("patch", "/v1/devices/{device_id}") => json!({ "name": "Taken over" }),
        ("put", "/v1/key-packages") => json!({ "key_packages": [] }),
        ("post", "/v1/key-packages/fetch") => json!({ "accounts": [victim.account] }),
        ("put", "/v1/keys") => json!({ "one_time_prekeys": [Keys::ec(9_999)] }),
        ("post", "/v1/accounts/{account_id}/messages") => json!({ "client_message_id": 1, "envelopes": [victim.envelope(b"x")] }),
        ("post", "/v1/groups") => json!({ "group_info": b64(&[0; 32]), "tree": b64(&[0; 32]) }),
        ("post", "/v1/groups/{group_id}/commits") => json!({ "commit": b64(&[0; 32]), "group_info": b64(&[0; 32]) }),
        ("post", "/v1/groups/{group_id}/proposals") => json!({ "proposal": b64(&[0; 32]) }),
        ("post", "/v1/groups/{group_id}/messages") => json!({ "client_message_id": 1, "epoch": 0, "content": b64(&[0, 1, 0, 2, 5]) }),
        ("post", "/v1/inbox/ack") => json!({ "seq": 1 }),
        _ => panic!("{method} {path} has a body that this test does not know: teach it"),
    }
}

/// All that a device can see of itself.
async fn snapshot(broker: &TestBroker, device: &Device) -> Value {
    let mut seen = json!({});
    for path in ["/v1/account", "/v1/keys", "/v1/key-packages", "/v1/blocks", "/v1/inbox"] {
        seen[path] = broker.get(device, path).await.expect(StatusCode::OK).body;
    }
    seen
}

async fn attempt(broker: &TestBroker, operation: &Operation, authorization: Option<&str>) -> Answer {
    let mut request = broker.http.request(operation.method.clone(), broker.url(&operation.path));
    if operation.path == "/v1/stream" {
        request = request
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    }
    if let Some(authorization) = authorization {
        request = request.header("authorization", authorization);
    }
    if let Some(body) = &operation.body {
        request = request.json(body);
    }
    Answer::of(request.send().await.expect("an answer")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_right_credential_every_private_operation_is_refused_and_changes_nothing() {
    let broker = TestBroker::start().await;
    let (victim, other) = (broker.register("victim@socialink").await, broker.register("other@vignette").await);
    let revoked = broker.register("victim@socialink").await;
    broker.delete(&victim, &format!("/v1/devices/{}", revoked.id)).await.expect(StatusCode::NO_CONTENT);
    broker.send(&other, &[&victim], 1, b"waiting").await.expect(StatusCode::OK);
    wait_for_one_item(&broker, &victim).await;

    let token = broker.dev_token("victim@socialink").await;
    let mixed = mix(&victim.credential, &other.credential);
    let wrong = [
        None,
        Some("Bearer".to_owned()),
        Some("Bearer nonsense".to_owned()),
        Some(format!("Basic {}", victim.credential)),
        Some(format!("Bearer {}", &victim.credential[..victim.credential.len() - 1])),
        Some(format!("Bearer {}x", victim.credential)),
        Some(format!("Bearer {}", revoked.credential)),
        Some(format!("Bearer {mixed}")),
        Some(format!("Bearer {token}")),
    ];
    let before = snapshot(&broker, &victim).await;
    let mut answers = std::collections::BTreeSet::new();
    for operation in operations(&broker, &victim, &other).await.iter().filter(|operation| operation.private) {
        for authorization in &wrong {
            let answer = attempt(&broker, operation, authorization.as_deref()).await.refused(401, "unauthenticated");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
            answers.insert(answer.text);
        }
    }
    assert_eq!(answers.len(), 1, "all refusals read the same: {answers:?}");
    assert_eq!(snapshot(&broker, &victim).await, before);
    broker.stop().await;
}

/// The victim's address with the other's secret.
fn mix(victim: &str, other: &str) -> String {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let bytes = |text: &str| URL_SAFE_NO_PAD.decode(text.strip_prefix("sp1_").expect("a credential")).expect("base64");
    let mixed = [&bytes(victim)[..17], &bytes(other)[17..]].concat();
    format!("sp1_{}", URL_SAFE_NO_PAD.encode(mixed))
}

async fn wait_for_one_item(broker: &TestBroker, device: &Device) {
    let page = broker.get(device, "/v1/inbox?wait_s=10").await.expect(StatusCode::OK);
    assert_eq!(page.body["items"].as_array().map(Vec::len), Some(1), "{}", page.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_another_accounts_credential_nothing_of_the_victim_changes_and_nothing_private_is_seen() {
    let broker = TestBroker::start().await;
    let (victim, third) = (broker.register("victim@socialink").await, broker.register("third@local").await);
    broker.put(&victim, &format!("/v1/blocks/{}", third.account), json!({})).await.expect(StatusCode::NO_CONTENT);
    broker.send(&victim, &[&third], 1, b"waiting").await.expect(StatusCode::OK);
    let before = snapshot(&broker, &victim).await;
    for (n, operation) in operations(&broker, &victim, &third).await.iter().enumerate().filter(|(_, operation)| operation.private) {
        // What others may do to an account: send to it, and take one of its one-time prekeys. Both have tests of their own.
        if operation.path.contains("/accounts/") && operation.path.ends_with("/messages")
            || operation.path.ends_with("/keys") && operation.path.contains("/accounts/")
        {
            continue;
        }
        // Twice: the intruder's own device has the victim's number, or another one.
        for device in 1..=2 {
            let intruder = intruder(&broker, n, device).await;
            let answer = attempt(&broker, operation, Some(&format!("Bearer {}", intruder.credential))).await;
            let text = &answer.text;
            assert!(!text.contains("\"name\":\"Test\"") || !text.contains(&victim.account), "{operation:?} shows what is private: {text}");
            assert!(answer.status.as_u16() < 500, "{operation:?}: {text}");
        }
        assert_eq!(snapshot(&broker, &victim).await, before, "{operation:?}");
    }
    broker.stop().await;
}

async fn intruder(broker: &TestBroker, n: usize, device: u32) -> Device {
    let name = format!("intruder{n}-{device}@vignette");
    let mut registered = broker.register_with(&name, 0).await;
    while registered.id < device {
        registered = broker.register_with(&name, 0).await;
    }
    registered
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_name_in_another_realm_is_another_person() {
    let broker = TestBroker::start().await;
    let (here, there) = (broker.register("alice@socialink").await, broker.register("alice@vignette").await);
    assert_ne!(here.account, there.account);
    let token = broker.dev_token("alice@vignette").await;
    broker.post(&here, "/v1/account/identities", json!({ "token": token })).await.refused(409, "conflict");
    broker.delete(&here, "/v1/account/identities/alice@vignette").await.refused(404, "not_found");
    let mine = broker.get(&here, "/v1/account").await.expect(StatusCode::OK).body;
    assert_eq!(mine["identities"], json!(["alice@socialink"]));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn public_operations_are_the_known_few() {
    let broker = TestBroker::start().await;
    let victim = broker.register("victim@socialink").await;
    let mut public: Vec<_> = operations(&broker, &victim, &victim).await.iter().filter(|o| !o.private).map(|o| format!("{o:?}")).collect();
    public.sort();
    let expected = ["GET /healthz", "GET /metrics", "GET /readyz", "GET /v1/server", "POST /v1/dev/token", "POST /v1/devices"];
    assert_eq!(public, expected);
    broker.stop().await;
}
