//! Registering, linking, renaming, revoking, blocking, deleting, by HTTP.

mod support;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use support::{Keys, TestBroker, b64};

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_makes_an_account_and_further_ones_join_it() {
    let broker = TestBroker::start().await;
    let first = broker.register("alice@socialink").await;
    let second = broker.register("alice@socialink").await;
    assert_eq!((first.account.as_str(), first.id, second.id), (second.account.as_str(), 1, 2));
    let mine = broker.get(&second, "/v1/account").await.expect(StatusCode::OK).body;
    assert_eq!(
        (&mine["account_id"], &mine["device_id"], &mine["identities"]),
        (&json!(first.account), &json!(2), &json!(["alice@socialink"]))
    );
    let devices = mine["devices"].as_array().expect("devices");
    assert_eq!(devices.len(), 2);
    assert_eq!(devices[0]["registration_id"], json!(first.keys.registration_id));
    assert_eq!(devices[0]["identity_key"], json!(support::b64(&first.keys.identity.identity_key().serialize())));
    assert!(devices[0]["created_ms"].as_u64().is_some_and(|ms| ms > 1_700_000_000_000));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_with_anything_wrong_are_refused_and_make_nothing() {
    let broker = TestBroker::start().await;
    let token = broker.dev_token("alice@socialink").await;
    let keys = Keys::new(1);
    let right = keys.registration(&[&token]);
    let with = |field: &str, value: Value| {
        let mut body = right.clone();
        body[field] = value;
        body
    };
    let stranger = Keys::new(0);
    let signed_by_stranger = stranger.signed_ec(1);
    let many: Vec<_> = (0..101).map(Keys::ec).collect();
    let eight_tokens: Vec<_> = (0..9).map(|_| token.clone()).collect();
    for (body, status, code) in [
        (with("tokens", json!([])), 400, "bad_request"),
        (with("tokens", json!(eight_tokens)), 400, "bad_request"),
        (with("tokens", json!(["x".repeat(9_000)])), 401, "unauthenticated"),
        (with("tokens", json!([token.clone() + "x"])), 401, "unauthenticated"),
        (with("name", json!("")), 400, "bad_request"),
        (with("name", json!("x".repeat(65))), 400, "bad_request"),
        (with("registration_id", json!(0)), 400, "bad_request"),
        (with("registration_id", json!(16_381)), 400, "bad_request"),
        (with("identity_key", json!("AAAA")), 400, "bad_request"),
        (with("identity_key", json!("not base64")), 400, "bad_request"),
        (with("signed_prekey", signed_by_stranger), 400, "bad_request"),
        (with("pq_last_resort_prekey", keys.signed_ec(1)), 400, "bad_request"),
        (with("one_time_prekeys", json!(many)), 400, "bad_request"),
        (with("pq_one_time_prekeys", json!([keys.signed_pq(1), stranger.signed_pq(2)])), 400, "bad_request"),
        (with("signed_prekey", Value::Null), 400, "bad_request"),
    ] {
        broker.call(Method::POST, "/v1/devices", None, Some(body)).await.refused(status, code);
    }
    let looker = broker.register("looker@local").await;
    broker.get(&looker, "/v1/identities/alice@socialink").await.refused(404, "not_found");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_are_linked_by_token_and_belong_to_one_account() {
    let broker = TestBroker::start().await;
    let (a, b) = (broker.dev_token("a@socialink").await, broker.dev_token("a@vignette").await);
    let answer =
        broker.call(Method::POST, "/v1/devices", None, Some(Keys::new(0).registration(&[&a, &b, &a]))).await.expect(StatusCode::CREATED);
    assert_eq!(answer.body["identities"], json!(["a@socialink", "a@vignette"]));
    let device = broker.register("a@vignette").await;
    assert_eq!(json!(device.account), answer.body["account_id"], "either identity leads to the account");

    let other = broker.register("other@local").await;
    broker.post(&other, "/v1/account/identities", json!({ "token": a })).await.refused(409, "conflict");
    let c = broker.dev_token("c@local").await;
    broker.call(Method::POST, "/v1/devices", None, Some(Keys::new(0).registration(&[&c, &a]))).await.refused(409, "conflict");
    broker.get(&other, "/v1/identities/c@local").await.refused(404, "not_found");

    let linked = broker.post(&device, "/v1/account/identities", json!({ "token": c })).await.expect(StatusCode::OK).body;
    assert_eq!(linked["identities"].as_array().map(Vec::len), Some(3));
    let found = broker.get(&other, "/v1/identities/c@local").await.expect(StatusCode::OK).body;
    assert_eq!(found["account_id"], json!(device.account));
    assert!(found["devices"][0].get("name").is_none(), "names are the owner's own: {found}");

    for identity in ["c@local", "a%40socialink"] {
        broker.delete(&device, &format!("/v1/account/identities/{identity}")).await.expect(StatusCode::NO_CONTENT);
    }
    broker.delete(&device, "/v1/account/identities/a@vignette").await.refused(409, "conflict");
    broker.get(&other, "/v1/identities/c@local").await.refused(404, "not_found");
    let newcomer = broker.register("c@local").await;
    assert_ne!(newcomer.account, device.account, "a freed identity is free");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_renamed_and_revoked() {
    let broker = TestBroker::start().await;
    let (first, second) = (broker.register("alice@local").await, broker.register("alice@local").await);
    let rename = |id: u32, name: &str| {
        let body = Some(json!({ "name": name }));
        let path = format!("/v1/devices/{id}");
        let (broker, credential) = (&broker, first.credential.clone());
        async move { broker.call(Method::PATCH, &path, Some(&credential), body).await }
    };
    rename(2, " Tablet ").await.expect(StatusCode::NO_CONTENT);
    rename(3, "Nobody").await.refused(404, "not_found");
    rename(0, "Zero").await.refused(400, "bad_request");
    rename(2, "").await.refused(400, "bad_request");
    let mine = broker.get(&first, "/v1/account").await.expect(StatusCode::OK).body;
    assert_eq!(mine["devices"][1]["name"], "Tablet");

    broker.delete(&first, "/v1/devices/2").await.expect(StatusCode::NO_CONTENT);
    broker.get(&second, "/v1/account").await.refused(401, "unauthenticated");
    broker.delete(&first, "/v1/devices/2").await.refused(404, "not_found");
    broker.delete(&first, "/v1/devices/1").await.expect(StatusCode::NO_CONTENT);
    broker.get(&first, "/v1/account").await.refused(401, "unauthenticated");
    let again = broker.register("alice@local").await;
    assert_eq!(again.account, first.account, "the account outlives its devices");
    assert_eq!(again.id, 3, "numbers are reused as late as can be");
    broker.stop().await;
}

/// With a secret of the client's own, a registration whose answer was lost is repeated and makes nothing new.
#[tokio::test(flavor = "multi_thread")]
async fn a_registration_with_a_secret_of_its_own_is_idempotent() {
    let broker = TestBroker::start().await;
    let reader = broker.register("reader@local").await;
    let token = broker.dev_token("alice@local").await;
    let keys = Keys::new(2);
    let body = |keys: &Keys, secret: &[u8]| {
        let mut body = keys.registration(&[&token]);
        body["credential_secret"] = json!(b64(secret));
        body
    };
    let register = |body: Value| broker.call(Method::POST, "/v1/devices", None, Some(body));
    let secret: Vec<u8> = (7..39).collect();
    let first = register(body(&keys, &secret)).await.expect(StatusCode::CREATED).body;
    let account = first["account_id"].as_str().expect("an account");
    let bundles = broker.get(&reader, &format!("/v1/accounts/{account}/keys")).await.expect(StatusCode::OK).body;
    assert!(bundles["devices"][0]["one_time_prekey"].is_object());
    for _ in 0..2 {
        assert_eq!(register(body(&keys, &secret)).await.expect(StatusCode::CREATED).body, first);
    }
    let credential = first["credential"].as_str().expect("a credential");
    let mine = broker.call(Method::GET, "/v1/account", Some(credential), None).await.expect(StatusCode::OK).body;
    assert_eq!(mine["devices"].as_array().map(Vec::len), Some(1));
    let left = broker.call(Method::GET, "/v1/keys", Some(credential), None).await.body;
    assert_eq!(left, json!({ "one_time_prekeys": 1, "pq_one_time_prekeys": 1 }), "what somebody took does not come back");

    register(body(&Keys::new(0), &secret)).await.refused(409, "conflict");
    register(body(&keys, &secret[1..])).await.refused(400, "bad_request");
    register(body(&keys, &[5; 32])).await.refused(400, "bad_request");
    // A further identity is linked by the repeat if the first try did not come that far.
    let mut more = body(&keys, &secret);
    more["tokens"] = json!([token, broker.dev_token("alice@vignette").await]);
    let linked = register(more).await.expect(StatusCode::CREATED).body;
    assert_eq!((&linked["device_id"], &linked["identities"]), (&first["device_id"], &json!(["alice@local", "alice@vignette"])));
    // A revoked device does not come back by itself: it is another one.
    broker.call(Method::DELETE, "/v1/devices/1", Some(credential), None).await.expect(StatusCode::NO_CONTENT);
    let again = register(body(&keys, &secret)).await.expect(StatusCode::CREATED).body;
    assert_eq!((&again["account_id"], &again["device_id"]), (&first["account_id"], &json!(2)));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_eleventh_device_is_refused() {
    let broker = TestBroker::start().await;
    for _ in 0..10 {
        broker.register_with("alice@local", 0).await;
    }
    let token = broker.dev_token("alice@local").await;
    broker.call(Method::POST, "/v1/devices", None, Some(Keys::new(0).registration(&[&token]))).await.refused(403, "limit_reached");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_kept_listed_and_taken_back() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register("alice@local").await, broker.register("bob@local").await);
    let path = format!("/v1/blocks/{}", bob.account);
    for _ in 0..2 {
        broker.put(&alice, &path, json!({})).await.expect(StatusCode::NO_CONTENT);
    }
    assert_eq!(broker.get(&alice, "/v1/blocks").await.body, json!({ "accounts": [bob.account] }));
    broker.send(&bob, &[&alice], 1, b"let me in").await.refused(403, "blocked");
    broker.send(&alice, &[&bob], 1, b"out is free").await.expect(StatusCode::OK);
    for _ in 0..2 {
        broker.delete(&alice, &path).await.expect(StatusCode::NO_CONTENT);
    }
    assert_eq!(broker.get(&alice, "/v1/blocks").await.body, json!({ "accounts": [] }));
    broker.send(&bob, &[&alice], 1, b"thanks").await.expect(StatusCode::OK);
    broker.put(&alice, &format!("/v1/blocks/{}", alice.account), json!({})).await.refused(400, "bad_request");
    broker.put(&alice, "/v1/blocks/nobody", json!({})).await.refused(400, "bad_request");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_account_is_gone_at_once_and_its_identity_free() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register("alice@local").await, broker.register("bob@local").await);
    broker.send(&bob, &[&alice], 1, b"before").await.expect(StatusCode::OK);
    broker.delete(&alice, "/v1/account").await.expect(StatusCode::NO_CONTENT);
    broker.get(&alice, "/v1/inbox").await.refused(401, "unauthenticated");
    broker.delete(&alice, "/v1/account").await.refused(401, "unauthenticated");
    broker.get(&bob, &format!("/v1/accounts/{}", alice.account)).await.refused(410, "account_deleted");
    broker.get(&bob, &format!("/v1/accounts/{}/keys", alice.account)).await.refused(410, "account_deleted");
    broker.get(&bob, "/v1/identities/alice@local").await.refused(404, "not_found");
    broker.send(&bob, &[&alice], 2, b"after").await.refused(410, "account_deleted");
    let again = broker.register("alice@local").await;
    assert_ne!(again.account, alice.account);
    assert_eq!(broker.get(&again, "/v1/inbox").await.body, json!({ "items": [], "empty": true }));
    broker.stop().await;
}

/// What was answered is there after a restart: credentials, links, blocks.
#[tokio::test(flavor = "multi_thread")]
async fn accounts_survive_a_restart() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register("alice@local").await, broker.register("bob@local").await);
    broker.put(&alice, &format!("/v1/blocks/{}", bob.account), json!({})).await.expect(StatusCode::NO_CONTENT);
    let before = broker.get(&alice, "/v1/account").await.body;
    let dir = broker.stop().await;
    let broker = TestBroker::in_folder(dir, "").await;
    assert_eq!(broker.get(&alice, "/v1/account").await.expect(StatusCode::OK).body, before);
    assert_eq!(broker.get(&alice, "/v1/blocks").await.body, json!({ "accounts": [bob.account] }));
    assert_eq!(broker.get(&bob, "/v1/keys").await.body, json!({ "one_time_prekeys": 3, "pq_one_time_prekeys": 3 }));
    broker.stop().await;
}
