//! Sending and receiving by HTTP only: what a client without a stream lives on.

mod support;

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};
use support::{Device, TestBroker, b64, unb64};

async fn items(broker: &TestBroker, device: &Device, query: &str) -> Vec<Value> {
    let page = broker.get(device, &format!("/v1/inbox{query}")).await.expect(StatusCode::OK).body;
    page["items"].as_array().expect("items").clone()
}

/// Waits until there are so many.
async fn wait_for(broker: &TestBroker, device: &Device, count: usize) -> Vec<Value> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let found = items(broker, device, "?limit=500").await;
        if found.len() >= count || Instant::now() > until {
            assert_eq!(found.len(), count, "{found:?}");
            return found;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_waits_is_read_acknowledged_and_receipted() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register_with("alice@local", 0).await, broker.register_with("bob@local", 0).await);
    let body = json!({ "client_message_id": 1, "urgent": true, "envelopes": [bob.envelope(b"ciphertext")] });
    let accepted = broker.post(&alice, &format!("/v1/accounts/{}/messages", bob.account), body).await.expect(StatusCode::OK);
    assert_eq!(accepted.body, json!({ "accepted": true }));

    let page = broker.get(&bob, "/v1/inbox?wait_s=10").await.expect(StatusCode::OK).body;
    assert_eq!(page["empty"], json!(true));
    let envelope = &page["items"][0]["envelope"];
    assert_eq!((&envelope["sender_account"], &envelope["sender_device"]), (&json!(alice.account), &json!(1)));
    assert_eq!((&envelope["client_message_id"], &envelope["type"], &envelope["urgent"]), (&json!(1), &json!(2), &json!(true)));
    assert_eq!(unb64(&envelope["content"]), b"ciphertext");
    assert!(envelope["accepted_ms"].as_u64().is_some_and(|ms| ms > 1_700_000_000_000));

    assert_eq!(items(&broker, &bob, "").await.len(), 1, "what is not acknowledged comes again");
    let seq = envelope["seq"].as_u64().expect("a seq");
    assert_eq!(items(&broker, &bob, &format!("?after={seq}")).await, Vec::<Value>::new());
    broker.post(&bob, "/v1/inbox/ack", json!({ "seq": seq })).await.expect(StatusCode::NO_CONTENT);
    let until = Instant::now() + Duration::from_secs(10);
    while !items(&broker, &bob, "").await.is_empty() {
        assert!(Instant::now() < until, "acknowledged items go");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let receipt = wait_for(&broker, &alice, 1).await.remove(0);
    let entry = &receipt["receipt"]["entries"][0];
    assert_eq!((&entry["account"], &entry["device"], &entry["kind"]), (&json!(bob.account), &json!(1), &json!("delivered")));
    assert_eq!(entry["client_message_ids"], json!([[1, 1]]));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeats_are_accepted_and_delivered_once_in_order() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register_with("alice@local", 0).await, broker.register_with("bob@local", 0).await);
    for id in [1, 2, 1, 3, 3, 2] {
        broker.send(&alice, &[&bob], id, format!("message {id}").as_bytes()).await.expect(StatusCode::OK);
    }
    let found = wait_for(&broker, &bob, 3).await;
    let texts: Vec<_> = found.iter().map(|item| String::from_utf8(unb64(&item["envelope"]["content"])).expect("text")).collect();
    assert_eq!(texts, ["message 1", "message 2", "message 3"]);
    let seqs: Vec<_> = found.iter().map(|item| item["envelope"]["seq"].as_u64().expect("a seq")).collect();
    assert!(seqs.is_sorted_by(|a, b| a < b), "{seqs:?}");
    broker.send(&alice, &[&bob], 500, b"far ahead").await.expect(StatusCode::OK);
    broker.send(&alice, &[&bob], 372, b"too far behind").await.refused(409, "stale_message_id");
    broker.send(&alice, &[&bob], 373, b"just not").await.expect(StatusCode::OK);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_devices_are_answered_with_lists_and_nothing_is_accepted() {
    let broker = TestBroker::start().await;
    let alice = broker.register_with("alice@local", 0).await;
    let (phone, tablet) = (broker.register_with("bob@local", 0).await, broker.register_with("bob@local", 0).await);
    let missing = broker.send(&alice, &[&phone], 1, b"x").await.refused(409, "device_mismatch");
    assert_eq!((&missing.body["missing_devices"], missing.body.get("extra_devices")), (&json!([tablet.id]), None));
    let path = format!("/v1/accounts/{}/messages", phone.account);
    let mut ghost = phone.envelope(b"x");
    ghost["device_id"] = json!(77);
    let extra =
        broker.post(&alice, &path, json!({ "client_message_id": 1, "envelopes": [phone.envelope(b"x"), tablet.envelope(b"x"), ghost] }));
    assert_eq!(extra.await.refused(409, "device_mismatch").body["extra_devices"], json!([77]));
    let mut stale = tablet.envelope(b"x");
    stale["registration_id"] = json!(tablet.keys.registration_id % 16_380 + 1);
    let stale = broker.post(&alice, &path, json!({ "client_message_id": 1, "envelopes": [phone.envelope(b"x"), stale] }));
    assert_eq!(stale.await.refused(410, "stale_devices").body["stale_devices"], json!([tablet.id]));
    broker.send(&alice, &[&phone, &tablet], 1, b"right").await.expect(StatusCode::OK);
    assert_eq!(wait_for(&broker, &phone, 1).await.len(), 1);
    assert_eq!(wait_for(&broker, &tablet, 1).await.len(), 1);
    // The sender's own other devices get their copy the same way.
    broker.send(&phone, &[&tablet], 1, b"copy").await.expect(StatusCode::OK);
    broker.send(&phone, &[&phone, &tablet], 2, b"to oneself").await.refused(409, "device_mismatch");
    wait_for(&broker, &tablet, 2).await;
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_and_oversized_requests_are_refused() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register_with("alice@local", 0).await, broker.register_with("bob@local", 0).await);
    let path = format!("/v1/accounts/{}/messages", bob.account);
    let send = |envelope: Value| broker.post(&alice, &path, json!({ "client_message_id": 1, "envelopes": [envelope] }));
    let with = |field: &str, value: Value| {
        let mut envelope = bob.envelope(b"x");
        envelope[field] = value;
        envelope
    };
    send(with("type", json!(1))).await.refused(400, "bad_request");
    send(with("content", json!(""))).await.refused(400, "bad_request");
    send(with("content", json!("?"))).await.refused(400, "bad_request");
    send(with("device_id", json!(128))).await.refused(400, "bad_request");
    send(with("content", json!(b64(&vec![0; 262_145])))).await.refused(413, "too_large");
    send(with("content", json!(b64(&vec![0; 4 * 1024 * 1024])))).await.refused(413, "too_large");
    send(with("content", json!(b64(&vec![0; 262_144])))).await.expect(StatusCode::OK);
    broker.post(&alice, &path, json!({ "client_message_id": 0, "envelopes": [bob.envelope(b"x")] })).await.refused(400, "bad_request");
    broker.post(&alice, &path, json!({ "client_message_id": 1, "envelopes": [] })).await.refused(400, "bad_request");
    let nobody = "/v1/accounts/00000000-0000-4000-8000-000000000000/messages";
    broker.post(&alice, nobody, json!({ "client_message_id": 1, "envelopes": [bob.envelope(b"x")] })).await.refused(404, "not_found");
    for query in ["?limit=0", "?limit=501", "?wait_s=61", "?after=x"] {
        broker.get(&bob, &format!("/v1/inbox{query}")).await.refused(400, "bad_request");
    }
    broker.post(&bob, "/v1/inbox/ack", json!({ "seq": 1_u64 << 40 })).await.refused(400, "bad_request");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_follow_each_other_and_long_polls_wake_up() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register_with("alice@local", 0).await, broker.register_with("bob@local", 0).await);
    for id in 1..=25 {
        broker.send(&alice, &[&bob], id, &id.to_le_bytes()).await.expect(StatusCode::OK);
    }
    wait_for(&broker, &bob, 25).await;
    let (mut after, mut seen, mut pages) = (0, Vec::new(), 0);
    loop {
        let page = broker.get(&bob, &format!("/v1/inbox?after={after}&limit=10")).await.expect(StatusCode::OK).body;
        for item in page["items"].as_array().expect("items") {
            after = item["envelope"]["seq"].as_u64().expect("a seq");
            seen.push(item["envelope"]["client_message_id"].as_u64().expect("an id"));
        }
        pages += 1;
        if page["empty"] == json!(true) {
            break;
        }
    }
    assert_eq!((seen, pages), ((1..=25).collect(), 3));

    let started = Instant::now();
    let nothing = broker.get(&bob, &format!("/v1/inbox?after={after}&wait_s=1")).await.expect(StatusCode::OK).body;
    assert_eq!(nothing, json!({ "items": [], "empty": true }));
    assert!(started.elapsed() >= Duration::from_millis(900), "waited");
    let poll_path = format!("/v1/inbox?after={after}&wait_s=20");
    let started = Instant::now();
    let (polled, _) = tokio::join!(broker.get(&bob, &poll_path), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        broker.send(&alice, &[&bob], 26, b"wake up").await.expect(StatusCode::OK)
    });
    assert_eq!(polled.body["items"][0]["envelope"]["client_message_id"], json!(26));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn message_rates_are_limited_per_device() {
    let broker = TestBroker::with("[limits]\nmessages_per_device_per_s = 2").await;
    let (alice, bob) = (broker.register_with("alice@local", 0).await, broker.register_with("bob@local", 0).await);
    let mut limited = None;
    for id in 1..=40 {
        let answer = broker.send(&alice, &[&bob], id, b"x").await;
        if answer.status != StatusCode::OK {
            limited = Some(answer);
            break;
        }
    }
    let limited = limited.expect("40 at once are too many").refused(429, "rate_limited");
    assert!(limited.body["retry_after_ms"].as_u64().is_some_and(|ms| ms > 0) && limited.headers.contains_key("retry-after"));
    broker.send(&bob, &[&alice], 1, b"another device").await.expect(StatusCode::OK);
    broker.stop().await;
}
