//! Publishing MLS KeyPackages and fetching those of many accounts, by HTTP. G-PREKEY-ONCE.

mod support;

use std::collections::HashSet;

use futures_util::StreamExt as _;
use prost::Message as _;
use reqwest::StatusCode;
use sealpost::client::core::groups::Engine;
use sealpost::client::core::state::{MemoryState, StateKey, StateTx, encode_address};
use sealpost::clock::{Clock as _, SystemClock, SystemRandom, UnixMillis};
use sealpost::ids::{AccountId, DeviceAddr, DeviceId};
use sealpost::mls::key_package;
use sealpost::wire::stream::{ServerBatch, server_frame::Frame};
use serde_json::{Value, json};
use support::{Device, TestBroker, b64, unb64};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::Message;

fn address(device: &Device) -> DeviceAddr {
    DeviceAddr { account: device.account.parse().expect("an account"), device: DeviceId::new(device.id).expect("a device") }
}

/// New KeyPackages of a device, and one of last resort.
fn packages_at(of: DeviceAddr, count: usize, now: UnixMillis) -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut state = MemoryState::default();
    state.commit([(StateKey::OwnAddress, Some(encode_address(of).into()))].into());
    let tx = StateTx::new(&state);
    let engine = Engine::new(&tx, &SystemRandom).expect("a registered device");
    (engine.key_packages(count, now).expect("KeyPackages"), engine.last_resort_key_package(now).expect("a last resort"))
}

fn packages(of: &Device, count: usize) -> (Vec<Vec<u8>>, Vec<u8>) {
    packages_at(address(of), count, SystemClock.now())
}

fn numbered(packages: &[Vec<u8>], first: usize) -> Value {
    packages.iter().enumerate().map(|(at, bytes)| json!({ "id": first + at, "key_package": b64(bytes) })).collect()
}

async fn publish(broker: &TestBroker, device: &Device, count: usize, last_resort: bool) -> (Vec<Vec<u8>>, Vec<u8>) {
    let (some, last) = packages(device, count);
    let mut body = json!({ "key_packages": numbered(&some, 0) });
    if last_resort {
        body["last_resort"] = json!(b64(&last));
    }
    let counts = broker.put(device, "/v1/key-packages", body).await.expect(StatusCode::OK).body;
    assert_eq!(counts, json!({ "key_packages": count, "last_resort": last_resort }));
    (some, last)
}

async fn fetch(broker: &TestBroker, by: &Device, accounts: &[&str]) -> Value {
    broker.post(by, "/v1/key-packages/fetch", json!({ "accounts": accounts })).await.expect(StatusCode::OK).body
}

#[tokio::test(flavor = "multi_thread")]
async fn many_accounts_at_once_each_key_package_once_then_the_last_resort() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register("alice@local").await, broker.register("bob@local").await);
    let (tablet, carol) = (broker.register("bob@local").await, broker.register("carol@vignette").await);
    let (bobs, bobs_last) = publish(&broker, &bob, 2, true).await;
    let (carols, _) = publish(&broker, &carol, 1, false).await;
    let nobody = AccountId::from_bytes([7; 16]).to_string();
    for round in 0..3 {
        let found = fetch(&broker, &alice, &[&carol.account, &nobody, &bob.account]).await;
        assert_eq!(found["gone"], json!([nobody]));
        let [carol_found, bob_found] = found["accounts"].as_array().expect("accounts").as_slice() else { panic!("two: {found}") };
        assert_eq!((&carol_found["account_id"], &bob_found["account_id"]), (&json!(carol.account), &json!(bob.account)));
        let expected = if round == 0 { json!(b64(&carols[0])) } else { Value::Null };
        assert_eq!(carol_found["devices"], json!([{ "device_id": 1, "key_package": expected, "last_resort": false }]));
        let (bytes, last) = bobs.get(round).map_or((&bobs_last, true), |bytes| (bytes, false));
        let phone = json!({ "device_id": 1, "key_package": b64(bytes), "last_resort": last });
        assert_eq!(bob_found["devices"], json!([phone, { "device_id": tablet.id, "key_package": null, "last_resort": false }]));
        let checked =
            key_package::check(&unb64(&bob_found["devices"][0]["key_package"]), Some(address(&bob)), SystemClock.now(), &SystemRandom);
        assert_eq!(checked.expect("valid").last_resort, last);
    }
    let own = fetch(&broker, &bob, &[&bob.account]).await;
    assert_eq!(own["accounts"][0]["devices"].as_array().map(Vec::len), Some(1), "only the other devices");
    assert_eq!(broker.get(&bob, "/v1/key-packages").await.body, json!({ "key_packages": 0, "last_resort": true }));

    broker.post(&alice, "/v1/key-packages/fetch", json!({ "accounts": [bob.account, bob.account] })).await.refused(400, "bad_request");
    let many: Vec<String> = (0..=1_500u128).map(|n| AccountId::from_bytes(n.to_be_bytes()).to_string()).collect();
    broker.post(&alice, "/v1/key-packages/fetch", json!({ "accounts": many })).await.refused(400, "bad_request");
    assert_eq!(fetch(&broker, &alice, &many[1..].iter().map(String::as_str).collect::<Vec<_>>()).await["gone"], json!(many[1..]));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_validated_and_nothing_of_a_bad_one_is_kept() {
    let broker = TestBroker::start().await;
    let (bob, eve) = (broker.register("bob@local").await, broker.register("eve@local").await);
    let (good, last) = packages(&bob, 2);
    let (others, _) = packages(&eve, 1);
    let long_ago = UnixMillis(SystemClock.now().0 - 100 * 24 * 3600 * 1000);
    let (expired, _) = packages_at(address(&bob), 1, long_ago);
    let mut damaged = good[1].clone();
    *damaged.last_mut().expect("bytes") ^= 1;
    let with = |bytes: &[u8]| json!([{ "id": 1, "key_package": b64(&good[0]) }, { "id": 2, "key_package": b64(bytes) }]);
    for (wrong, why) in [
        (json!({ "key_packages": with(&others[0]) }), "another device"),
        (json!({ "key_packages": with(&expired[0]) }), "lifetime"),
        (json!({ "key_packages": with(&damaged) }), "not valid"),
        (json!({ "key_packages": with(&last) }), "last-resort"),
        (json!({ "key_packages": with(b"") }), "not an MLS message"),
        (json!({ "key_packages": with(&[0; 2049]) }), "larger"),
        (json!({ "last_resort": b64(&good[0]) }), "last-resort"),
        (json!({ "key_packages": [with(&good[1])[0], with(&good[1])[0]] }), "twice"),
        (json!({ "key_packages": numbered(&vec![good[0].clone(); 101], 0) }), "more than 100"),
    ] {
        let answer = broker.put(&bob, "/v1/key-packages", wrong).await.refused(400, "bad_request");
        assert!(answer.text.contains(why), "{why}: {}", answer.text);
    }
    assert_eq!(broker.get(&bob, "/v1/key-packages").await.body, json!({ "key_packages": 0, "last_resort": false }));
    let hundred = vec![good[0].clone(); 100];
    for batch in 0..10 {
        let body = json!({ "key_packages": numbered(&hundred, batch * 100) });
        broker.put(&bob, "/v1/key-packages", body).await.expect(StatusCode::OK);
    }
    let more = json!({ "key_packages": numbered(&good[..1], 1_000) });
    broker.put(&bob, "/v1/key-packages", more).await.refused(403, "limit_reached");
    assert_eq!(broker.get(&bob, "/v1/key-packages").await.body["key_packages"], json!(1_000));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_is_handed_out_once_also_to_many_at_once_and_across_a_restart() {
    const PACKAGES: usize = 24;
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register("alice@local").await, broker.register("bob@local").await);
    publish(&broker, &bob, PACKAGES, true).await;
    let mut seen = HashSet::new();
    let mut note = |found: Value| {
        let device = &found["accounts"][0]["devices"][0];
        let fresh = seen.insert(unb64(&device["key_package"]));
        assert!(fresh || device["last_resort"] == json!(true), "handed out twice");
    };
    let accounts = [bob.account.as_str()];
    futures_util::future::join_all((0..10).map(|_| fetch(&broker, &alice, &accounts))).await.into_iter().for_each(&mut note);
    let dir = broker.stop().await;
    let broker = TestBroker::in_folder(dir, "").await;
    futures_util::future::join_all((0..18).map(|_| fetch(&broker, &alice, &accounts))).await.into_iter().for_each(&mut note);
    assert_eq!(seen.len(), PACKAGES + 1, "all of them went, and the last resort");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fetches_are_limited_pools_protected_and_a_new_device_does_not_inherit() {
    let limits = "[limits]\nkey_package_fetches_per_device_per_min = 3\none_time_prekeys_per_device_per_min = 2";
    let broker = TestBroker::with(limits).await;
    let (alice, bob) = (broker.register("alice@local").await, broker.register("bob@local").await);
    publish(&broker, &bob, 5, true).await;
    let mut last = Vec::new();
    for _ in 0..3 {
        last.push(fetch(&broker, &alice, &[&bob.account]).await["accounts"][0]["devices"][0]["last_resort"].take());
    }
    assert_eq!(last, [json!(false), json!(false), json!(true)]);
    assert_eq!(broker.get(&bob, "/v1/key-packages").await.body["key_packages"], json!(3));
    broker.post(&alice, "/v1/key-packages/fetch", json!({ "accounts": [] })).await.refused(429, "rate_limited");

    broker.delete(&bob, "/v1/devices/1").await.expect(StatusCode::NO_CONTENT);
    let again = broker.register("bob@local").await;
    assert_eq!(broker.get(&again, "/v1/key-packages").await.body, json!({ "key_packages": 0, "last_resort": false }));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_says_when_few_are_left() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register("alice@local").await, broker.register("bob@local").await);
    publish(&broker, &bob, 21, false).await;
    let mut request = broker.url("/v1/stream").replace("http://", "ws://").into_client_request().expect("a request");
    request.headers_mut().insert("authorization", format!("Bearer {}", bob.credential).parse().expect("a value"));
    let mut stream = tokio_tungstenite::connect_async(request).await.expect("opens").0;
    for _ in 0..2 {
        fetch(&broker, &alice, &[&bob.account]).await;
    }
    let low = async {
        loop {
            let Message::Binary(bytes) = stream.next().await.expect("the stream is open").expect("a message") else { continue };
            for frame in ServerBatch::decode(bytes).expect("a batch").frames {
                if let Some(Frame::KeyPackagesLow(low)) = frame.frame {
                    return low.remaining;
                }
            }
        }
    };
    let remaining = tokio::time::timeout(std::time::Duration::from_secs(20), low).await.expect("it is said");
    assert_eq!(remaining, 19, "the first fetch leaves 20, which is enough");
    broker.stop().await;
}
