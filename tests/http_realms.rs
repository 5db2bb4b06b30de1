//! Realm tokens of every kind, as platforms sign them: registered, rotated, and refused when anything is wrong.

#[path = "support/realm.rs"]
mod realm;
mod support;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use realm::{KeyServer, SigningKey};
use reqwest::{Method, StatusCode};
use sealpost::auth::realm::{Realms, TokenError};
use sealpost::clock::{ManualClock, UnixMillis};
use sealpost::config::Realm;
use sealpost::limits;
use sealpost::testing::process::BrokerProcess;
use serde_json::{Value, json};
use support::{Keys, TestBroker};

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

fn claims(realm: &str, user: &str) -> Value {
    json!({ "iss": format!("https://{realm}.example"), "aud": "sealpost", "sub": user, "exp": now_s() + 600, "iat": now_s() })
}

/// A broker with three realms: one for each algorithm, one of them with a file.
async fn broker() -> (TestBroker, [SigningKey; 3]) {
    let keys = [SigningKey::eddsa("ed"), SigningKey::es256("ec"), SigningKey::rs256("rsa", 2048)];
    let dir = Arc::new(tempfile::tempdir().expect("a folder"));
    let file = dir.path().join("keys.json");
    std::fs::write(&file, json!({ "keys": [keys[1].public] }).to_string()).expect("writes");
    let (first, third) = (KeyServer::default(), KeyServer::default());
    first.publish(&[&keys[0]]);
    third.publish(&[&keys[2]]);
    let config = format!(
        r#"
        [[realms]]
        name = "first"
        issuer = "https://first.example"
        audience = "sealpost"
        jwks_url = "http://{}/keys"
        [[realms]]
        name = "second"
        issuer = "https://second.example"
        audience = "sealpost"
        jwks_file = "{}"
        algorithms = ["ES256"]
        [[realms]]
        name = "third"
        issuer = "https://third.example"
        audience = "sealpost"
        jwks_url = "http://{}/keys"
        "#,
        first.serve().await,
        file.display(),
        third.serve().await
    );
    (TestBroker::in_folder(dir, &config).await, keys)
}

async fn register(broker: &TestBroker, tokens: &[&str]) -> support::Answer {
    broker.call(Method::POST, "/v1/devices", None, Some(Keys::new(0).registration(tokens))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_all_three_algorithms_register_and_link() {
    let (broker, [ed, ec, rsa]) = broker().await;
    let tokens = [ed.sign(&claims("first", "alice")), ec.sign(&claims("second", "alice")), rsa.sign(&claims("third", "al.ice+x"))];
    let tokens: Vec<_> = tokens.iter().map(String::as_str).collect();
    let answer = register(&broker, &tokens).await.expect(StatusCode::CREATED);
    assert_eq!(answer.body["identities"], json!(["alice@first", "alice@second", "al.ice+x@third"]));
    let mut many = claims("first", "bob");
    many["aud"] = json!(["other", "sealpost"]);
    register(&broker, &[&ed.sign(&many)]).await.expect(StatusCode::CREATED);
    broker.call(Method::POST, "/v1/dev/token", None, Some(json!({ "identity": "alice@local" }))).await.refused(404, "not_found");
    let server = broker.call(Method::GET, "/v1/server", None, None).await.expect(StatusCode::OK).body;
    assert_eq!(server["dev"], json!(false));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_with_anything_wrong_are_refused_with_the_reason() {
    let (broker, [ed, ec, rsa]) = broker().await;
    let with = |field: &str, value: Value| {
        let mut claims = claims("first", "mallory");
        claims[field] = value;
        claims
    };
    let without = |field: &str| {
        let mut claims = claims("first", "mallory");
        claims.as_object_mut().expect("an object").remove(field);
        claims
    };
    let stranger = SigningKey { kid: "ed".to_owned(), ..SigningKey::eddsa("ed") };
    let unknown = SigningKey::eddsa("unknown");
    let none = {
        let parts = ed.sign(&claims("first", "mallory"));
        let payload = parts.split('.').nth(1).expect("a payload").to_owned();
        format!("eyJhbGciOiJub25lIn0.{payload}.x")
    };
    // The classical confusion: the public key as an HMAC secret.
    let confused = {
        use base64::Engine as _;
        let x = rsa.public["n"].as_str().expect("a modulus");
        let secret = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(x).expect("base64");
        let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256);
        header.kid = Some("rsa".to_owned());
        jsonwebtoken::encode(&header, &claims("third", "mallory"), &jsonwebtoken::EncodingKey::from_secret(&secret)).expect("signs")
    };
    let other_algorithm = SigningKey { kid: "ec".to_owned(), ..SigningKey::eddsa("ec") };
    for (token, reason) in [
        (ed.sign(&with("iss", json!("https://elsewhere.example"))), "issuer"),
        (ed.sign(&with("aud", json!("somebody-else"))), "issuer and audience"),
        (ed.sign(&with("exp", json!(now_s() - 61))), "expired"),
        (ed.sign(&with("nbf", json!(now_s() + 90))), "not valid yet"),
        (ed.sign(&with("exp", json!("tomorrow"))), "not a signed JWT"),
        (ed.sign(&with("sub", json!("a b"))), "subject"),
        (ed.sign(&with("sub", json!("a@b"))), "subject"),
        (ed.sign(&with("sub", json!("x".repeat(129)))), "subject"),
        (ed.sign(&without("exp")), "not a signed JWT"),
        (ed.sign(&without("sub")), "not a signed JWT"),
        (ed.sign(&without("aud")), "not a signed JWT"),
        // Another realm's key, by its own name and by this realm's.
        (ec.sign(&claims("first", "mallory")), "no key"),
        (stranger.sign(&claims("first", "mallory")), "signature"),
        (unknown.sign(&claims("first", "mallory")), "no key"),
        (other_algorithm.sign(&claims("second", "mallory")), "algorithm"),
        (none, "algorithm"),
        (confused, "algorithm"),
        ("x".repeat(limits::REALM_TOKEN_BYTES + 1), "longer"),
        ("nonsense".to_owned(), "not a signed JWT"),
    ] {
        let answer = register(&broker, &[&token]).await.refused(401, "unauthenticated");
        assert!(answer.body["message"].as_str().is_some_and(|message| message.contains(reason)), "{reason}: {}", answer.text);
    }
    let looker = register(&broker, &[&ed.sign(&claims("first", "looker"))]).await.expect(StatusCode::CREATED);
    let credential = looker.body["credential"].as_str().expect("a credential").to_owned();
    let found = broker.call(Method::GET, "/v1/identities/mallory@first", Some(&credential), None).await;
    found.refused(404, "not_found");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_development_key_is_worth_nothing_without_development_mode() {
    let dir = Arc::new(tempfile::tempdir().expect("a folder"));
    let broker = TestBroker::in_folder(dir, "dev = true").await;
    let token = broker.dev_token("alice@socialink").await;
    let dir = broker.stop().await;
    assert!(dir.path().join("dev-realm.key").exists());
    let keys = KeyServer::default();
    keys.publish(&[&SigningKey::eddsa("ed")]);
    let config = format!(
        "[[realms]]\nname = \"socialink\"\nissuer = \"i\"\naudience = \"sealpost\"\njwks_url = \"http://{}/keys\"",
        keys.serve().await
    );
    let broker = TestBroker::in_folder(dir, &config).await;
    register(&broker, &[&token]).await.refused(401, "unauthenticated");
    let dir = broker.stop().await;
    assert!(!dir.path().join("dev-realm.key").exists(), "so that `sealpost token` is refused from then on");
}

/// From the outside: what a platform does when it replaces its signing key, by URL and by file, while the broker runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_broker_follows_when_a_platform_rotates_its_keys() {
    let (old, new) = (SigningKey::rs256("old", 2048), SigningKey::eddsa("new"));
    let dir = Arc::new(tempfile::tempdir().expect("a folder"));
    let (keys, file) = (KeyServer::default(), dir.path().join("keys.json"));
    let publish = |published: &[&SigningKey]| {
        keys.publish(published);
        std::fs::write(&file, keys.answer.lock().1.as_bytes()).expect("writes");
    };
    publish(&[&old]);
    let realm = |name: &str, source: String| {
        format!("[[realms]]\nname = \"{name}\"\nissuer = \"https://{name}.example\"\naudience = \"sealpost\"\n{source}\n")
    };
    let text = realm("first", format!("jwks_url = \"http://{}/keys\"", keys.serve().await))
        + &realm("second", format!("jwks_file = \"{}\"", file.display()));
    let clock = ManualClock::new(UnixMillis(now_s() * 1000));
    let running = sealpost::server::Broker::start_by(support::config(dir.path(), &text), Arc::new(clock.clone())).await;
    let broker =
        TestBroker { broker: running.expect("starts"), dir, http: reqwest::Client::builder().no_proxy().build().expect("a client") };
    let try_both = async |key: &SigningKey, user: &str| {
        let mut statuses = Vec::new();
        for realm in ["first", "second"] {
            statuses.push(register(&broker, &[&key.sign(&claims(realm, user))]).await.status.as_u16());
        }
        statuses
    };
    for user in ["a", "b", "c"] {
        assert_eq!(try_both(&old, user).await, [201, 201]);
    }
    assert_eq!(keys.asked(), 1, "cached");
    assert_eq!(try_both(&new, "d").await, [401, 401], "not published yet");
    publish(&[&old, &new]);
    clock.advance(limits::JWKS_REFRESH_MIN_MS);
    assert_eq!(try_both(&new, "d").await, [201, 201], "an unknown key makes the broker look");
    assert_eq!(try_both(&old, "e").await, [201, 201]);
    publish(&[&new]);
    clock.advance(limits::JWKS_REFRESH_MIN_MS);
    assert_eq!(try_both(&SigningKey::eddsa("unknown"), "f").await, [401, 401]);
    assert_eq!((try_both(&old, "g").await, try_both(&new, "g").await), (vec![401, 401], vec![201, 201]), "the old one was withdrawn");
    broker.stop().await;
}

/// The program itself: what it says, and what `sealpost token` does, with development mode and without.
#[tokio::test(flavor = "multi_thread")]
async fn development_mode_is_said_loudly_and_only_its_folder_signs_tokens() {
    let dir = tempfile::tempdir().expect("a folder");
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_sealpost"));
    let (data, log) = (dir.path().join("data"), dir.path().join("log"));
    let mut broker = BrokerProcess::start(program, &data, &log).await.expect("starts");
    let said = std::fs::read_to_string(&log).expect("a log");
    assert!(said.contains("WARN") && said.contains("DEVELOPMENT MODE is on"), "{said}");
    let sign = |data: &std::path::Path| {
        let output = std::process::Command::new(program).args(["token", "alice@local", "--data"]).arg(data).output().expect("runs");
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned())
    };
    let (signed, token) = sign(&data);
    assert!(signed, "{token}");
    let answer = reqwest::Client::builder()
        .no_proxy()
        .build()
        .expect("a client")
        .post(broker.url().join("v1/devices").expect("a URL"))
        .json(&Keys::new(0).registration(&[&token]))
        .send()
        .await
        .expect("an answer");
    assert_eq!(answer.status(), StatusCode::CREATED);
    let (signed, why) = sign(&dir.path().join("elsewhere"));
    assert!(!signed && why.contains("development mode"), "{why}");
    assert!(broker.stop(std::time::Duration::from_secs(30)).await.expect("stops"));
}

fn realm_at(address: std::net::SocketAddr) -> Realm {
    let text =
        format!("name = \"first\"\nissuer = \"https://first.example\"\naudience = \"sealpost\"\njwks_url = \"http://{address}/keys\"");
    toml::from_str(&text).expect("parses")
}

#[tokio::test]
async fn keys_rotate_without_a_restart_and_a_flood_of_unknown_keys_costs_one_fetch() {
    let (old, new) = (SigningKey::eddsa("old"), SigningKey::es256("new"));
    let keys = KeyServer::default();
    keys.publish(&[&old]);
    let clock = ManualClock::new(UnixMillis(now_s() * 1000));
    let realms = Realms::open(&[realm_at(keys.serve().await)], None, Arc::new(clock.clone())).await.expect("opens");
    assert!(realms.verify(&old.sign(&claims("first", "alice"))).await.is_ok());
    assert_eq!(keys.asked(), 1);

    keys.publish(&[&old, &new]);
    clock.advance(limits::JWKS_REFRESH_MIN_MS);
    let token = new.sign(&claims("first", "alice"));
    let unknown = SigningKey::eddsa("unknown").sign(&claims("first", "alice"));
    let flood = futures_util::future::join_all((0..50).map(|_| realms.verify(&unknown))).await;
    assert!(flood.iter().all(|outcome| *outcome == Err(TokenError::UnknownKey)), "{flood:?}");
    assert_eq!(keys.asked(), 2);
    assert!(realms.verify(&token).await.is_ok(), "the new key came with it");
    assert!(realms.verify(&old.sign(&claims("first", "alice"))).await.is_ok(), "the old one is still published");
    assert_eq!(keys.asked(), 2);

    keys.publish(&[&new]);
    clock.advance(limits::JWKS_REFRESH_MIN_MS);
    assert!(realms.verify(&unknown).await.is_err());
    assert_eq!(realms.verify(&old.sign(&claims("first", "alice"))).await, Err(TokenError::UnknownKey), "withdrawn");
}

#[tokio::test]
async fn a_failing_key_server_is_ridden_out_for_a_day() {
    let key = SigningKey::eddsa("ed");
    let keys = KeyServer::default();
    keys.fail(500);
    let clock = ManualClock::new(UnixMillis(now_s() * 1000));
    let realms = Realms::open(&[realm_at(keys.serve().await)], None, Arc::new(clock.clone())).await.expect("opens in spite of it");
    let mut long = claims("first", "alice");
    long["exp"] = json!(now_s() + 10 * 24 * 3600);
    let token = key.sign(&long);
    assert_eq!(realms.verify(&token).await, Err(TokenError::KeysUnavailable));
    keys.publish(&[&key]);
    clock.advance(limits::JWKS_REFRESH_MIN_MS);
    assert!(realms.verify(&token).await.is_ok(), "it came up");
    keys.fail(503);
    clock.advance(limits::JWKS_STALE_MAX_MS);
    assert!(realms.verify(&token).await.is_ok(), "what is known holds");
    clock.advance(1);
    assert_eq!(realms.verify(&token).await, Err(TokenError::KeysUnavailable), "for a day");
    *keys.answer.lock() = (200, " ".repeat(limits::JWKS_BYTES + 1));
    clock.advance(limits::JWKS_REFRESH_MIN_MS);
    assert_eq!(realms.verify(&token).await, Err(TokenError::KeysUnavailable), "a key set has a size");
}

#[tokio::test]
async fn weak_keys_and_ambiguous_tokens_are_refused() {
    let (weak, first, second) = (SigningKey::rs256("weak", 1024), SigningKey::eddsa("first"), SigningKey::eddsa("second"));
    let keys = KeyServer::default();
    keys.publish(&[&weak, &first, &second]);
    let clock = Arc::new(ManualClock::new(UnixMillis(now_s() * 1000)));
    let realms = Realms::open(&[realm_at(keys.serve().await)], None, clock).await.expect("opens");
    assert_eq!(realms.verify(&weak.sign(&claims("first", "alice"))).await, Err(TokenError::UnknownKey));
    let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::EdDSA);
    let unnamed = jsonwebtoken::encode(&header, &claims("first", "alice"), &first.private).expect("signs");
    assert_eq!(realms.verify(&unnamed).await, Err(TokenError::UnknownKey), "which of the two?");
    assert!(realms.verify(&second.sign(&claims("first", "alice"))).await.is_ok());
}
