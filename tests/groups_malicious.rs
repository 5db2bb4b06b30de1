//! Members and strangers that mean harm, over real sockets: each is refused with the code that `docs/client-protocol.md` 13.6 to 13.8 names, nobody
//! gets to see it, and the group goes on.

#[path = "support/member.rs"]
mod member;
#[path = "support/sdk.rs"]
mod sdk;

use std::time::Duration;

use bytes::Bytes;
use ed25519_dalek::Signer as _;
use member::{Member, b64, follow, item, unb64};
use reqwest::{Method, StatusCode};
use sdk::{World, live, told, until};
use sealpost::client::core::groups::{Change, Outgoing};
use sealpost::client::core::state::{StateKey, StateRead as _};
use sealpost::client::{Client, ConversationId, Event, Membership};
use sealpost::clock::SystemRandom;
use sealpost::ids::GroupId;
use sealpost::limits;
use sealpost::mls::framing::{GroupInfo, Malformed};
use sealpost::testing::{Broker, RawDevice, RawStream};
use sealpost::wire::stream::{Code, client_frame};
use serde_json::{Value, json};

/// A group of three, all in it, with a stream of the last one, who watches what the others are given.
struct Scene {
    broker: Broker,
    alice: Member,
    bob: Member,
    carol: Member,
    stream: RawStream,
}

fn code(answer: &(StatusCode, Value)) -> (u16, &str) {
    (answer.0.as_u16(), answer.1["code"].as_str().unwrap_or_default())
}

impl Scene {
    async fn new() -> Self {
        let broker = Broker::start().await.expect("starts");
        let group = GroupId::random(&SystemRandom);
        let mut members = Vec::new();
        for name in ["alice@socialink", "bob@vignette", "carol@local"] {
            members.push(Member::new(broker.device(name).await.expect("registers"), group));
        }
        let [mut alice, bob, carol]: [Member; 3] = members.try_into().ok().expect("three");
        alice.create().await;
        let mut others = [bob, carol];
        alice.add(&mut others).await;
        for other in &mut others {
            other.join().await;
        }
        let [bob, carol] = others;
        let mut stream = carol.device.connect().await.expect("connects");
        assert_eq!(follow(&mut stream, group).await.code(), Code::Ok);
        Self { broker, alice, bob, carol, stream }
    }

    /// Nothing of what was refused reached anybody, and the group takes what is right.
    async fn goes_on(mut self, head: u64) {
        assert!(self.stream.silent(Duration::from_millis(200)).await.is_ok(), "nobody gets what is refused");
        assert_eq!(self.alice.page(0, 500).await["head"], head, "it has no place");
        self.alice.commit(&Change::default()).await;
        self.carol.catch_up(500).await;
        let send = self.carol.next_send(b"still here");
        assert_eq!(self.carol.post(&send).await.0, StatusCode::OK);
        // Durable is not yet in the group's store.
        let mut read = self.alice.catch_up(500).await;
        while read.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
            read = self.alice.catch_up(500).await;
        }
        assert_eq!(read, [b"still here"]);
        assert_eq!(self.alice.view(), self.carol.view());
    }
}

async fn commit(by: &Member, body: Value) -> (StatusCode, Value) {
    by.call(Method::POST, &by.path("/commits"), Some(body)).await
}

async fn propose(by: &Member, proposal: &[u8]) -> (StatusCode, Value) {
    by.call(Method::POST, &by.path("/proposals"), Some(json!({ "proposal": b64(proposal) }))).await
}

async fn write(by: &Member, epoch: u64, content: &[u8]) -> (StatusCode, Value) {
    let body = json!({ "client_message_id": 1_000, "epoch": epoch, "content": b64(content) });
    by.call(Method::POST, &by.path("/messages"), Some(body)).await
}

/// The same commit with another part.
fn with(commit: &Outgoing, field: &str, bytes: &[u8]) -> Value {
    let mut body = Member::commit_body(commit);
    body[field] = b64(bytes).into();
    body
}

/// What a device would commit, taken back at once.
fn would_commit(member: &mut Member, change: &Change<'_>) -> Outgoing {
    let outgoing = member.change(change);
    member.in_group(|group, engine| group.refused(engine)).expect("pending");
    outgoing
}

/// A GroupInfo signed again by the member, without an extension.
fn signed_by(member: &Member, info: &[u8], without: u16) -> Vec<u8> {
    let stored = member.state.get(&StateKey::GroupSigner(1)).expect("read").expect("it has a key");
    let key = ed25519_dalek::SigningKey::from_bytes(stored[..32].try_into().expect("32 bytes"));
    let sign = |bytes: &[u8]| Ok::<_, Malformed>(key.sign(bytes).to_bytes().to_vec());
    GroupInfo::parse(info).expect("a GroupInfo").without(without, sign).expect("signed")
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_senders_get_nowhere() {
    let mut scene = Scene::new().await;
    let Scene { alice, bob, carol, .. } = &mut scene;
    let head = bob.cursor;
    let of_bob = would_commit(bob, &Change::default());
    // A commit and a proposal of somebody else's, and a commit that says to be somebody else's.
    assert_eq!(code(&commit(alice, Member::commit_body(&of_bob)).await), (403, "forbidden"));
    let leave = bob.in_group(|group, engine| group.leave(engine)).expect("a proposal");
    assert_eq!(code(&propose(alice, &leave).await), (403, "forbidden"));
    // MLSMessage 4, group id 17, epoch 8, kind of sender 1; then the leaf.
    let mut as_carol = of_bob.commit.clone();
    assert_eq!(as_carol[29..34], [1, 0, 0, 0, 1]);
    as_carol[33] = 2;
    assert_eq!(code(&commit(carol, with(&of_bob, "commit", &as_carol)).await), (400, "bad_request"));
    assert_eq!(code(&commit(bob, with(&of_bob, "commit", &as_carol)).await), (400, "bad_request"));
    // Somebody else's external commit.
    let info = bob.call(Method::GET, &bob.path("/info"), None).await.1;
    let (group_info, tree) = (unb64(&info["group_info"]), unb64(&info["tree"]));
    let mut lost = Member::new(bob.device.clone(), bob.group);
    lost.state = bob.state.clone();
    let again = lost.run(|engine| Ok(engine.rejoin(&group_info, &tree)?.1)).expect("an external commit");
    assert_eq!(code(&commit(carol, Member::commit_body(&again)).await), (403, "forbidden"));
    scene.goes_on(head).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_belongs_to_another_group_or_epoch_is_refused() {
    let mut scene = Scene::new().await;
    let Scene { alice, bob, .. } = &mut scene;
    // Another group of the same two.
    let mut other = [alice, bob].map(|member| {
        let mut other = Member::new(member.device.clone(), GroupId::from_bytes([0x77; 16]));
        other.state = member.state.clone();
        other
    });
    let [alice_there, bob_there] = &mut other;
    alice_there.create().await;
    let key_package = bob_there.key_package();
    alice_there.commit(&Change { add: vec![(bob_there.addr(), &key_package)], ..Change::default() }).await;
    let head = alice_there.cursor;
    let (of_this, text) = (would_commit(&mut scene.bob, &Change::default()), scene.bob.encrypt(b"for the first group").1);
    // Who asked to leave can write nothing more in this epoch, so that comes last.
    let leave = scene.bob.in_group(|group, engine| group.leave(engine)).expect("a proposal");
    assert_eq!(code(&commit(bob_there, Member::commit_body(&of_this)).await), (400, "bad_request"));
    assert_eq!(code(&propose(bob_there, &leave).await), (400, "bad_request"));
    assert_eq!(code(&write(bob_there, 1, &text).await), (400, "bad_request"));
    assert_eq!(alice_there.page(0, 500).await["head"], head);

    // The head of a message says another epoch than its sender, or that it is no message.
    let Scene { alice, bob, stream, .. } = &mut scene;
    let mut kind = text.to_vec();
    assert_eq!(kind[29], 1, "application");
    kind[29] = 3;
    for wrong in [&kind[..], &text[..text.len() - 1], &[&text[..], &[0]].concat(), &of_this.commit, b""] {
        assert_eq!(code(&write(bob, 1, wrong).await), (400, "bad_request"));
    }
    assert_eq!(code(&write(bob, 0, &text).await), (400, "bad_request"));
    // Stale, and not begun.
    for _ in 0..=limits::PAST_EPOCHS {
        alice.commit(&Change::default()).await;
        item(stream).await;
    }
    let (head, epoch) = (alice.cursor, 2 + limits::PAST_EPOCHS as u64);
    for stale in [commit(bob, Member::commit_body(&of_this)).await, propose(bob, &leave).await, write(bob, 1, &text).await] {
        assert_eq!((code(&stale), stale.1["epoch"].as_u64()), ((409, "conflict"), Some(epoch)), "{}", stale.1);
        assert_eq!(stale.1["seq"], head, "where the group is");
    }
    assert_eq!(code(&write(bob, epoch + 1, &text).await), (409, "conflict"));
    scene.carol.catch_up(500).await;
    scene.goes_on(head).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_refused_by_size_alone() {
    let mut scene = Scene::new().await;
    let bob = &mut scene.bob;
    let (head, good) = (bob.cursor, would_commit(bob, &Change::default()));
    for field in ["commit", "welcome", "group_info"] {
        let large = with(&good, field, &vec![0; limits::COMMIT_BYTES + 1]);
        assert_eq!(code(&commit(bob, large).await), (413, "too_large"), "{field}");
    }
    assert_eq!(code(&propose(bob, &vec![0; limits::KEY_PACKAGE_BYTES + 1]).await), (413, "too_large"));
    let mut send = bob.next_send(b"text");
    send.content = Bytes::from(vec![0; limits::ENVELOPE_BYTES + 1]);
    assert_eq!(code(&bob.post(&send).await), (413, "too_large"));
    let mut stream = bob.device.connect().await.expect("connects");
    stream.frames(vec![client_frame::Frame::GroupSend(send.clone())]).await.expect("sent");
    assert_eq!(stream.result(send.request_id).await.expect("an answer").code(), Code::TooLarge);
    scene.goes_on(head).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_in_it_does_not_come_in_by_an_external_commit() {
    let mut scene = Scene::new().await;
    let head = scene.alice.cursor;
    let info = scene.alice.call(Method::GET, &scene.alice.path("/info"), None).await.1;
    let (group_info, tree) = (unb64(&info["group_info"]), unb64(&info["tree"]));
    let text = scene.bob.encrypt(b"borrowed").1;
    let leave = scene.bob.in_group(|group, engine| group.leave(engine)).expect("a proposal");
    // A stranger whom a member helps, and another device of a member, which nobody added.
    for name in ["stranger@local", "bob@vignette"] {
        let mut outside = Member::new(scene.broker.device(name).await.expect("registers"), scene.alice.group);
        let joins = outside.run(|engine| Ok(engine.rejoin(&group_info, &tree)?.1)).expect("an external commit");
        assert_eq!(code(&commit(&outside, Member::commit_body(&joins)).await), (403, "forbidden"), "{name}");
        // Nor does a member carry it in.
        assert_eq!(code(&commit(&scene.bob, Member::commit_body(&joins)).await), (403, "forbidden"), "{name}");
        assert_eq!(code(&outside.call(Method::GET, &outside.path("/info"), None).await), (403, "forbidden"), "{name}");
        assert_eq!(code(&propose(&outside, &leave).await), (403, "forbidden"), "{name}");
        assert_eq!(code(&write(&outside, 1, &text).await), (403, "forbidden"), "{name}");
    }
    scene.goes_on(head).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_removed_stays_out_until_somebody_adds_it() {
    let mut scene = Scene::new().await;
    let Scene { alice, bob, carol, stream, .. } = &mut scene;
    let (late, text) = (would_commit(bob, &Change::default()), bob.next_send(b"still in?"));
    let leave = bob.in_group(|group, engine| group.leave(engine)).expect("a proposal");
    alice.commit(&Change { remove_accounts: vec![bob.addr().account], ..Change::default() }).await;
    item(stream).await;
    assert_eq!(code(&bob.post(&text).await), (403, "forbidden"));
    assert_eq!(code(&commit(bob, Member::commit_body(&late)).await), (403, "forbidden"));
    assert_eq!(code(&propose(bob, &leave).await), (403, "forbidden"));
    // A member tells it what it may not fetch any more.
    assert_eq!(code(&bob.call(Method::GET, &bob.path("/info"), None).await), (403, "forbidden"));
    let info = alice.call(Method::GET, &alice.path("/info"), None).await.1;
    let (group_info, tree) = (unb64(&info["group_info"]), unb64(&info["tree"]));
    let joins = bob.run(|engine| Ok(engine.rejoin(&group_info, &tree)?.1)).expect("an external commit");
    assert_eq!(code(&commit(bob, Member::commit_body(&joins)).await), (403, "forbidden"));
    assert_eq!(code(&commit(carol, Member::commit_body(&joins)).await), (403, "forbidden"));
    carol.catch_up(500).await;
    assert!(stream.silent(Duration::from_millis(200)).await.is_ok());
    // Added again it is in again.
    let package = bob.key_package();
    let change = Change { add: vec![(bob.addr(), package.as_slice())], ..Change::default() };
    let head = alice.commit(&change).await;
    item(stream).await;
    carol.catch_up(500).await;
    scene.goes_on(head).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_info_that_would_keep_everybody_out_is_refused() {
    let mut scene = Scene::new().await;
    let Scene { bob, carol, .. } = &mut scene;
    let (head, good) = (bob.cursor, would_commit(bob, &Change::default()));
    let last = good.group_info.len() - 1;
    let mut signature = good.group_info.clone();
    signature[last] ^= 1;
    // The tag stands before the signer (4) and the signature (1 and 64); a key of zeros is one that nobody can encrypt to.
    let mut tag = good.group_info.clone();
    tag[last - 70] ^= 1;
    let key = good.group_info.windows(4).rposition(|window| window == [0, 4, 33, 32]).expect("external_pub") + 4;
    let mut zeros = good.group_info.clone();
    zeros[key..key + 32].fill(0);
    const NONE: u16 = 0xffff;
    let wrong = [
        ("its signature", signature),
        ("its signer", signed_by(carol, &good.group_info, NONE)),
        ("its confirmation tag", signed_by(bob, &tag, NONE)),
        ("no key", signed_by(bob, &good.group_info, 4)),
        ("a useless key", signed_by(bob, &zeros, NONE)),
    ];
    for (what, group_info) in wrong {
        assert_eq!(code(&commit(bob, with(&good, "group_info", &group_info)).await), (400, "bad_request"), "{what}");
    }
    assert_eq!(signed_by(bob, &good.group_info, NONE), good.group_info, "what was signed anew is otherwise right");
    scene.goes_on(head).await;
}

async fn texts(client: &Client, group: GroupId) -> Vec<String> {
    let history = client.history(ConversationId::Group(group), u64::MAX, 1_000).await.expect("history");
    history.into_iter().filter_map(|message| message.body).collect()
}

async fn epoch(client: &Client, group: GroupId) -> Option<u64> {
    let groups = client.groups().await.expect("list");
    groups.into_iter().find(|one| one.group == group && one.membership == Membership::Member).map(|one| one.epoch)
}

/// What a device has not fetched is gone, as if it had expired.
async fn lose_inbox(url: &str, database: &std::path::Path) {
    let database = rusqlite::Connection::open(database).expect("it opens");
    let credential: Vec<u8> = database.query_row("SELECT value FROM meta WHERE key = 'credential'", [], |row| row.get(0)).expect("there");
    let credential = String::from_utf8(credential).expect("a text");
    let http = sealpost::testing::http().expect("a client");
    let fetched = http.get(format!("{url}/v1/inbox?wait_s=20")).bearer_auth(&credential).send().await.expect("an answer");
    let page: Value = fetched.json().await.expect("a page");
    let last = page["items"].as_array().and_then(|items| items.last()).expect("an invitation");
    assert_eq!(last["envelope"]["type"], 16, "{page}");
    let ack = json!({ "seq": last["envelope"]["seq"] });
    let done = http.post(format!("{url}/v1/inbox/ack")).bearer_auth(&credential).json(&ack).send().await.expect("an answer");
    assert!(done.status().is_success(), "{}", done.status());
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_the_sdk_repair_a_group_that_a_member_broke() {
    let world = World::new().await;
    let alice = world.device("alice@socialink", "alice").await;
    let (bob, carol) = (world.device("bob@vignette", "bob").await, world.device("carol@local", "carol").await);
    let group = alice.create_group("Berge").await.expect("created");
    let raw = RawDevice::register(&world.url, "mallory@local").await.expect("registers");
    let mut mallory = Member::new(raw, group);
    let package = json!({ "key_packages": [{ "id": 1, "key_package": b64(&mallory.key_package()) }] });
    assert_eq!(mallory.call(Method::PUT, "/v1/key-packages", Some(package)).await.0, StatusCode::OK);
    let invited = alice.invite(group, &[bob.account(), carol.account(), mallory.addr().account]).await.expect("invited");
    assert_eq!(invited.unreachable, []);
    mallory.join().await;
    for client in [&bob, &carol] {
        until("it is in the group", async || epoch(client, group).await == Some(1)).await;
    }
    // The server can't tell that the tag at the end is wrong; nobody else can take it in.
    let mut broken = mallory.change(&Change::default());
    *broken.commit.last_mut().expect("bytes") ^= 1;
    assert_eq!(mallory.submit(&broken).await.0, StatusCode::OK);
    bob.send_text(group, "written meanwhile").await.expect("kept");
    let by = mallory.addr().account;
    for client in [&alice, &bob, &carol] {
        let is_told = |event: &Event| matches!(event, Event::GroupBroken { by: Some(who), epoch: 1, .. } if *who == by);
        until("it is told", async || told(client, is_told).await).await;
        until("it is back", async || told(client, |event| matches!(event, Event::GroupRejoined { .. })).await).await;
        until("it reads", async || texts(client, group).await == ["written meanwhile"]).await;
    }
    // Alice came back, and brought back the others; on a slow machine they may have been faster.
    until("all are at the same epoch", async || {
        let [first, second, third] = [&alice, &bob, &carol].map(|client| epoch(client, group));
        let (first, second, third) = tokio::join!(first, second, third);
        first >= Some(4) && first == second && second == third
    })
    .await;
    alice.remove_from_group(group, &[by]).await.expect("removed");
    assert_eq!(code(&mallory.submit(&broken).await), (403, "forbidden"));
    carol.send_text(group, "among us").await.expect("kept");
    until("it reads", async || texts(&bob, group).await == ["written meanwhile", "among us"]).await;

    // Bob was away for longer than his inbox keeps invitations.
    let second = alice.create_group("Hügel").await.expect("created");
    let (path, account) = (world.path("bob"), bob.account());
    bob.close().await;
    alice.invite(second, &[account]).await.expect("invited");
    lose_inbox(&world.url, &path).await;
    let bob = Client::open(&path).await.expect("opened");
    bob.start();
    live(&bob).await;
    until("it is in the second group", async || epoch(&bob, second).await.is_some()).await;
    let name = async || bob.groups().await.expect("list").into_iter().find(|one| one.group == second).and_then(|one| one.name);
    until("it was told the name", async || name().await.as_deref() == Some("Hügel")).await;
    alice.send_text(second, "found").await.expect("kept");
    until("it reads", async || texts(&bob, second).await == ["found"]).await;
    for client in [&alice, &bob, &carol] {
        client.stop().await;
    }
    world.broker.stop().await;
}
