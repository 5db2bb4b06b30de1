//! SDKs over real sockets when things change behind their backs: the answers 409 and 410, repaired without anybody's help; answers
//! that are lost; servers that fall silent; keys that grow old.

#[path = "support/sdk.rs"]
mod sdk;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::routing::get;
use prost::Message as _;
use sdk::{World, has, history, live, status, texts, told, until};
use sealpost::client::{Client, Connection, Environment, Event, Status, Trust};
use sealpost::clock::{Clock as _, ManualClock, SystemClock, SystemRandom};
use sealpost::ids::DeviceId;
use sealpost::testing::{RawDevice, http};
use sealpost::wire::stream::{Hello, QueueEmpty, ServerBatch, ServerFrame, server_frame::Frame};

/// How many sends the broker answered with this code so far.
async fn answers(world: &World, code: &str) -> u64 {
    let figures = http().expect("a client").get(format!("{}/metrics", world.url)).send().await.expect("an answer");
    let figures = figures.text().await.expect("text");
    let line = format!("sealpost_send_results_total{{code=\"{code}\"}} ");
    figures.lines().find_map(|found| found.strip_prefix(&line)?.parse().ok()).unwrap_or_default()
}

/// How often the application of this client was shown a text.
async fn shown(client: &Client, text: &str) -> usize {
    let events = client.events_after(0, 10_000).await.expect("events");
    let is_it = |event: &Event| matches!(event, Event::Message { message: Some(message), .. } if message.body.as_deref() == Some(text));
    events.iter().filter(|(_, event)| is_it(event)).count()
}

/// The only device of an account is revoked, and another installation gets its number: the first one after all others were used.
async fn reinstall(world: &World, old: Client, identity: &str, name: &str) -> Client {
    let address = old.address();
    old.revoke_device(address.device).await.expect("revoked");
    old.stop().await;
    let before = DeviceId::new((u32::from(address.device.get()) + 125) % 127 + 1).expect("a number");
    loop {
        let passing = RawDevice::register(&world.url, identity).await.expect("registered");
        let path = format!("/v1/devices/{}", passing.addr.device);
        let (status, _) = passing.call(reqwest::Method::DELETE, &path, None).await.expect("an answer");
        assert_eq!(status, reqwest::StatusCode::NO_CONTENT);
        if passing.addr.device == before {
            break;
        }
    }
    let new = world.device(identity, name).await;
    assert_eq!(new.address(), address);
    new
}

/// 410: the same device number, another registration id and another identity key.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_installation_under_an_old_number_is_repaired_and_told_and_held_if_it_was_verified() {
    let world = World::new().await;
    let (alice, bob) = (world.device("alice@socialink", "alice").await, world.device("bob@vignette", "bob").await);
    let bobs = bob.address();
    alice.send_text("bob@vignette", "hello").await.expect("sent");
    has(&bob, alice.account(), &["hello"]).await;
    bob.send_text(alice.account(), "hi").await.expect("sent");
    has(&alice, bobs.account, &["hello", "hi"]).await;

    // Nobody compared numbers: the message follows, and the change is told.
    let bob = reinstall(&world, bob, "bob@vignette", "second bob").await;
    let stale = answers(&world, "STALE_DEVICES").await;
    alice.send_text(bobs.account, "to whom?").await.expect("sent");
    has(&bob, alice.account(), &["to whom?"]).await;
    assert!(answers(&world, "STALE_DEVICES").await > stale, "the broker refused the old installation's envelope");
    status(&alice, bobs.account, Status::Delivered).await;
    let changed = |verified: bool| {
        move |event: &Event| *event == Event::IdentityChanged { account: bobs.account, device: bobs.device, was_verified: verified }
    };
    assert!(told(&alice, changed(false)).await && !told(&alice, changed(true)).await);
    bob.send_text(alice.account(), "the new one").await.expect("sent");
    has(&alice, bobs.account, &["hello", "hi", "to whom?", "the new one"]).await;
    assert_eq!((shown(&bob, "to whom?").await, shown(&alice, "the new one").await), (1, 1));

    // Somebody compared numbers: the message stays here until the person has looked.
    let number = alice.safety_number(bobs.account).await.expect("number");
    assert!(alice.verify(bobs.account, &number.digits).await.expect("compared"));
    let bob = reinstall(&world, bob, "bob@vignette", "third bob").await;
    alice.send_text(bobs.account, "secret").await.expect("kept: she does not know yet");
    until("she is warned", async || told(&alice, changed(true)).await).await;
    assert_eq!(alice.conversations().await.expect("list")[0].trust, Trust::Changed);
    assert!(alice.send_text(bobs.account, "more").await.is_err(), "nothing new is taken either");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(texts(&bob, alice.account()).await.is_empty(), "nothing left her device");
    assert_eq!(history(&alice, bobs.account).await.pop().expect("there").status, Status::Pending);
    alice.accept_identity(bobs.account).await.expect("accepted");
    has(&bob, alice.account(), &["secret"]).await;
    status(&alice, bobs.account, Status::Delivered).await;
    assert_eq!(alice.conversations().await.expect("list")[0].trust, Trust::Unverified);
    assert_eq!(shown(&bob, "secret").await, 1);
    alice.stop().await;
    bob.stop().await;
    world.broker.stop().await;
}

/// 409: for one message a device too few and a device too many, on both sides of the conversation.
#[tokio::test(flavor = "multi_thread")]
async fn devices_that_came_and_went_are_repaired_at_once() {
    let world = World::new().await;
    let (alice, desk) = (world.device("alice@socialink", "alice").await, world.device("alice@socialink", "desk").await);
    let (bob, tablet) = (world.device("bob@vignette", "bob").await, world.device("bob@vignette", "tablet").await);
    let (alices, bobs) = (alice.account(), bob.account());
    alice.send_text("bob@vignette", "hello").await.expect("sent");
    for (client, with) in [(&bob, alices), (&tablet, alices), (&desk, bobs)] {
        has(client, with, &["hello"]).await;
    }
    // Alice is away while they change, her own ones too: nobody tells her.
    alice.stop().await;
    bob.revoke_device(tablet.address().device).await.expect("revoked");
    desk.revoke_device(desk.address().device).await.expect("revoked");
    let (laptop, phone) = (world.device("bob@vignette", "laptop").await, world.device("alice@socialink", "phone").await);
    let mismatches = answers(&world, "DEVICE_MISMATCH").await;
    alice.send_text(bobs, "to the right ones").await.expect("kept");
    alice.start();
    live(&alice).await;
    has(&bob, alices, &["hello", "to the right ones"]).await;
    has(&laptop, alices, &["to the right ones"]).await;
    has(&phone, bobs, &["to the right ones"]).await;
    assert!(answers(&world, "DEVICE_MISMATCH").await > mismatches, "the broker refused the old list");
    status(&alice, bobs, Status::Delivered).await;
    let added = Event::DeviceAdded { account: bobs, device: laptop.address().device, was_verified: false };
    assert!(told(&alice, |event| *event == added).await);
    laptop.send_text(alices, "from the new one").await.expect("sent");
    for (client, with) in [(&alice, bobs), (&phone, bobs), (&bob, alices)] {
        until("the answer is there", async || texts(client, with).await.last().is_some_and(|text| text == "from the new one")).await;
    }
    for client in [&bob, &laptop, &phone] {
        assert_eq!(shown(client, "to the right ones").await, 1);
    }
    assert_eq!((texts(&tablet, alices).await.len(), texts(&desk, bobs).await.len()), (1, 1), "revoked ones got nothing more");
    for client in [alice, bob, laptop, phone, tablet, desk] {
        client.stop().await;
    }
    world.broker.stop().await;
}

async fn serve(listener: tokio::net::TcpListener, app: Router) -> SocketAddr {
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

/// A proxy before the broker that loses its first answer.
async fn forgetful_proxy(broker: String) -> SocketAddr {
    let (client, calls) = (http().expect("a client"), Arc::new(AtomicUsize::new(0)));
    let forward = move |method: axum::http::Method, uri: Uri, headers: HeaderMap, body: Bytes| {
        let request = client.request(method, format!("{broker}{uri}")).body(body);
        let kept = ["authorization", "content-type"].into_iter().filter_map(|name| Some((name, headers.get(name)?.clone())));
        let request = kept.fold(request, |request, (name, value)| request.header(name, value));
        let first = calls.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            let answer = request.send().await.expect("an answer");
            let (status, body) = (answer.status(), answer.bytes().await.expect("a body"));
            if first { (StatusCode::BAD_GATEWAY, Bytes::new()) } else { (status, body) }
        }
    };
    serve(tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port"), Router::new().fallback(forward)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_whose_answer_was_lost_is_found_again() {
    let world = World::new().await;
    let url = format!("http://{}", forgetful_proxy(world.url.clone()).await);
    let register = async || Client::register(&url, vec![world.token("alice@socialink").await], "alice", world.path("alice")).await;
    assert!(register().await.is_err(), "the answer was lost");
    let alice = register().await.expect("registered");
    assert_eq!(alice.devices().await.expect("list").len(), 1, "no device that nobody holds");
    let bob = world.device("bob@vignette", "bob").await;
    bob.send_text("alice@socialink", "hello").await.expect("sent");
    status(&bob, alice.account(), Status::Sent).await;
    // The keys that were published by the first call are those that it has.
    alice.close().await;
    let file = rusqlite::Connection::open(world.path("alice")).expect("opens");
    file.execute("UPDATE meta SET value = ?1 WHERE key = 'server'", [world.url.as_bytes()]).expect("the broker itself");
    drop(file);
    let alice = Client::open(world.path("alice")).await.expect("opens");
    alice.start();
    has(&alice, bob.account(), &["hello"]).await;
    alice.stop().await;
    bob.stop().await;
    world.broker.stop().await;
}

/// A server that accepts, says hello, and then is gone without a word: the client notices and comes again.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_server_is_left_and_tried_again() {
    let world = World::new().await;
    let alice = world.idle("alice@socialink", "alice").await;
    let address = world.broker.address();
    world.broker.stop().await;
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    let silent = move |upgrade: WebSocketUpgrade| {
        count.fetch_add(1, Ordering::SeqCst);
        async move {
            upgrade.on_upgrade(|mut socket| async move {
                let hello = Frame::Hello(Hello { cursor: 0, heartbeat_ms: 100, max_unacked_bytes: 0, server_time_ms: 0 });
                let frames = [hello, Frame::QueueEmpty(QueueEmpty::default())].map(|frame| ServerFrame { frame: Some(frame) });
                let batch = ServerBatch { frames: frames.into() }.encode_to_vec();
                let _ = socket.send(Message::Binary(batch.into())).await;
                std::future::pending::<()>().await;
            })
        }
    };
    let listener = tokio::net::TcpListener::bind(address).await.expect("the broker's port is free");
    serve(listener, Router::new().route("/v1/stream", get(silent)).fallback(|| async { StatusCode::SERVICE_UNAVAILABLE })).await;
    alice.start();
    live(&alice).await;
    until("it has left", async || *alice.connection().borrow() != Connection::Live).await;
    until("it came again", async || connections.load(Ordering::SeqCst) > 1).await;
    alice.stop().await;
}

/// Weekly rotation, by the client's own clock.
#[tokio::test(flavor = "multi_thread")]
async fn signed_prekeys_are_replaced_when_they_are_a_week_old() {
    let world = World::new().await;
    let clock = ManualClock::new(SystemClock.now());
    let environment = Environment { clock: Arc::new(clock.clone()), random: Arc::new(SystemRandom), ca: None };
    let token = world.token("alice@socialink").await;
    let alice = Client::register_with(&world.url, vec![token], "alice", world.path("alice"), environment).await.expect("registered");
    let reader = RawDevice::register(&world.url, "reader@local").await.expect("registered");
    let path = format!("/v1/accounts/{}/keys", alice.account());
    let published = async || {
        let (_, body) = reader.call(reqwest::Method::GET, &path, None).await.expect("an answer");
        body["devices"][0]["signed_prekey"]["id"].as_u64().expect("a key")
    };
    let first = published().await;
    alice.start();
    live(&alice).await;
    alice.stop().await;
    assert_eq!(published().await, first, "not before it is due");
    clock.advance(8 * 24 * 3_600_000);
    alice.start();
    until("the new one is published", async || published().await > first).await;
    // What was encrypted for the new one arrives.
    let bob = world.device("bob@vignette", "bob").await;
    bob.send_text("alice@socialink", "hello").await.expect("sent");
    has(&alice, bob.account(), &["hello"]).await;
    alice.stop().await;
    bob.stop().await;
    world.broker.stop().await;
}
