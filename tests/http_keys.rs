//! Publishing keys and fetching bundles, by HTTP. G-PREKEY-ONCE.

mod support;

use std::collections::HashSet;

use libsignal_protocol::PublicKey;
use reqwest::StatusCode;
use serde_json::{Value, json};
use support::{Device, Keys, TestBroker, unb64};

async fn bundles(broker: &TestBroker, asking: &Device, of: &Device) -> Value {
    broker.get(asking, &format!("/v1/accounts/{}/keys", of.account)).await.expect(StatusCode::OK).body["devices"].take()
}

fn verify(device: &Value) {
    let identity = PublicKey::deserialize(&unb64(&device["identity_key"])).expect("an identity key");
    for field in ["signed_prekey", "pq_prekey"] {
        let key = &device[field];
        assert!(identity.verify_signature(&unb64(&key["public_key"]), &unb64(&key["signature"])), "{field} is signed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bundles_hold_what_a_session_needs_and_fall_back_when_pools_are_empty() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register_with("alice@local", 0).await, broker.register_with("bob@local", 2).await);
    let tablet = broker.register_with("bob@local", 0).await;
    let mut one_time = HashSet::new();
    for round in 0..3 {
        let found = bundles(&broker, &alice, &bob).await;
        let [first, second] = found.as_array().expect("devices").as_slice() else { panic!("two devices: {found}") };
        verify(first);
        verify(second);
        assert_eq!((&first["device_id"], &first["registration_id"]), (&json!(1), &json!(bob.keys.registration_id)));
        assert_eq!(
            (&second["device_id"], &second["one_time_prekey"], &second["pq_prekey"]["id"]),
            (&json!(tablet.id), &Value::Null, &json!(1))
        );
        if round < 2 {
            assert!(one_time.insert(first["one_time_prekey"]["id"].as_u64()), "handed out once");
            assert!(one_time.insert(first["pq_prekey"]["id"].as_u64()), "handed out once");
        } else {
            assert_eq!((&first["one_time_prekey"], &first["pq_prekey"]["id"]), (&Value::Null, &json!(1)), "the last resort");
        }
    }
    let path = format!("/v1/accounts/{}/keys?device_id={}", bob.account, tablet.id);
    assert_eq!(broker.get(&alice, &path).await.expect(StatusCode::OK).body["devices"].as_array().map(Vec::len), Some(1));
    broker.get(&alice, &path.replace("device_id=2", "device_id=9")).await.refused(404, "not_found");
    broker.get(&alice, &path.replace("device_id=2", "device_id=0")).await.refused(400, "bad_request");
    broker.get(&alice, &path.replace("device_id=2", "device_id=x")).await.refused(400, "bad_request");
    broker.get(&alice, "/v1/accounts/00000000-0000-4000-8000-000000000000/keys").await.refused(404, "not_found");
    let own = bundles(&broker, &bob, &bob).await;
    assert_eq!(own[0]["device_id"], json!(tablet.id), "only the other devices: {own}");
    assert_eq!(own.as_array().map(Vec::len), Some(1));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_one_time_key_is_handed_out_once_also_to_many_at_once_and_across_a_restart() {
    const KEYS: u32 = 40;
    let broker = TestBroker::start().await;
    let bob = broker.register_with("bob@local", KEYS).await;
    let alice = broker.register_with("alice@local", 0).await;
    let mut ec = HashSet::new();
    let mut pq = HashSet::new();
    let mut note = |found: Value| {
        if let Some(id) = found[0]["one_time_prekey"]["id"].as_u64() {
            assert!(ec.insert(id), "EC {id} twice");
        }
        let id = found[0]["pq_prekey"]["id"].as_u64().expect("a key");
        assert!(id == 1 || pq.insert(id), "PQ {id} twice");
    };
    let fetches = (0..30).map(|_| bundles(&broker, &alice, &bob));
    futures_util::future::join_all(fetches).await.into_iter().for_each(&mut note);
    let dir = broker.stop().await;
    let broker = TestBroker::in_folder(dir, "").await;
    let fetches = (0..30).map(|_| bundles(&broker, &alice, &bob));
    futures_util::future::join_all(fetches).await.into_iter().for_each(&mut note);
    assert_eq!((ec.len(), pq.len()), (KEYS as usize, KEYS as usize), "all of them went");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_verified_counted_and_capped() {
    let broker = TestBroker::start().await;
    let (bob, alice) = (broker.register_with("bob@local", 0).await, broker.register_with("alice@local", 0).await);
    let counts = broker.put(
        &bob,
        "/v1/keys",
        json!({ "one_time_prekeys": [Keys::ec(1), Keys::ec(2)], "pq_one_time_prekeys": [bob.keys.signed_pq(7)] }),
    );
    assert_eq!(counts.await.expect(StatusCode::OK).body, json!({ "one_time_prekeys": 2, "pq_one_time_prekeys": 1 }));
    assert_eq!(broker.get(&bob, "/v1/keys").await.body, json!({ "one_time_prekeys": 2, "pq_one_time_prekeys": 1 }));

    let rotated = json!({ "signed_prekey": bob.keys.signed_ec(2), "pq_last_resort_prekey": bob.keys.signed_pq(2) });
    broker.put(&bob, "/v1/keys", rotated.clone()).await.expect(StatusCode::OK);
    let found = bundles(&broker, &alice, &bob).await;
    assert_eq!(found[0]["signed_prekey"], rotated["signed_prekey"]);
    assert_eq!(found[0]["pq_prekey"]["id"], json!(7));
    assert_eq!(bundles(&broker, &alice, &bob).await[0]["pq_prekey"], rotated["pq_last_resort_prekey"]);

    // Wrong in one part: nothing of it is kept.
    let stranger = Keys::new(0);
    for wrong in [
        json!({ "one_time_prekeys": [Keys::ec(5)], "signed_prekey": stranger.signed_ec(3) }),
        json!({ "one_time_prekeys": [Keys::ec(5)], "pq_one_time_prekeys": [stranger.signed_pq(3)] }),
        json!({ "one_time_prekeys": [Keys::ec(5), Keys::ec(5)] }),
        json!({ "one_time_prekeys": [{ "id": 5, "public_key": "AAAA" }] }),
        json!({ "one_time_prekeys": (0..101).map(Keys::ec).collect::<Vec<_>>() }),
    ] {
        broker.put(&bob, "/v1/keys", wrong).await.refused(400, "bad_request");
    }
    assert_eq!(broker.get(&bob, "/v1/keys").await.body, json!({ "one_time_prekeys": 0, "pq_one_time_prekeys": 0 }));

    for batch in 0..10 {
        let keys: Vec<_> = (0..100).map(|n| Keys::ec(1_000 + batch * 100 + n)).collect();
        broker.put(&bob, "/v1/keys", json!({ "one_time_prekeys": keys })).await.expect(StatusCode::OK);
    }
    broker.put(&bob, "/v1/keys", json!({ "one_time_prekeys": [Keys::ec(9)] })).await.refused(403, "limit_reached");
    assert_eq!(broker.get(&bob, "/v1/keys").await.body["one_time_prekeys"], json!(1_000));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_devices_keys_do_not_come_back_with_its_number() {
    let broker = TestBroker::start().await;
    let alice = broker.register_with("alice@local", 0).await;
    let bob = broker.register_with("bob@local", 5).await;
    broker.delete(&bob, "/v1/devices/1").await.expect(StatusCode::NO_CONTENT);
    assert_eq!(bundles(&broker, &alice, &bob).await, json!([]));
    let again = broker.register_with("bob@local", 0).await;
    assert_eq!(broker.get(&again, "/v1/keys").await.body, json!({ "one_time_prekeys": 0, "pq_one_time_prekeys": 0 }));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fetches_are_limited_and_pools_protected() {
    let broker = TestBroker::with("[limits]\nkey_fetches_per_device_per_min = 3\none_time_prekeys_per_device_per_min = 4").await;
    let bob = broker.register_with("bob@local", 10).await;
    let (alice, carol) = (broker.register_with("alice@local", 0).await, broker.register_with("carol@local", 0).await);
    let path = format!("/v1/accounts/{}/keys", bob.account);
    for _ in 0..3 {
        assert!(bundles(&broker, &alice, &bob).await[0]["one_time_prekey"].is_object());
    }
    let refused = broker.get(&alice, &path).await.refused(429, "rate_limited");
    let wait: u64 = refused.headers["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert_eq!(wait, refused.body["retry_after_ms"].as_u64().expect("milliseconds").div_ceil(1_000));
    assert!(bundles(&broker, &carol, &bob).await[0]["one_time_prekey"].is_object(), "another device is not limited");
    let protected = bundles(&broker, &carol, &bob).await;
    assert_eq!((&protected[0]["one_time_prekey"], &protected[0]["pq_prekey"]["id"]), (&Value::Null, &json!(1)), "the pool is");
    verify(&protected[0]);
    assert_eq!(broker.get(&bob, "/v1/keys").await.body["one_time_prekeys"], json!(6));
    broker.stop().await;
}
