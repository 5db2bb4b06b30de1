//! Groups over real sockets: what `docs/client-protocol.md` section 13 promises of the server.

#[path = "support/member.rs"]
mod member;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use member::{Member, b64, follow, item};
use reqwest::{Method, StatusCode};
use sealpost::client::core::groups::Change;
use sealpost::client::core::repair;
use sealpost::clock::SystemRandom;
use sealpost::ids::GroupId;
use sealpost::limits;
use sealpost::testing::Broker;
use sealpost::wire::stream::{Code, GroupItemKind, client_frame, server_frame::Frame};
use serde_json::json;
use tokio::sync::Barrier;

fn code(answer: &(StatusCode, serde_json::Value)) -> (u16, &str) {
    (answer.0.as_u16(), answer.1["code"].as_str().unwrap_or_default())
}

async fn members<const N: usize>(broker: &Broker) -> [Member; N] {
    registered(broker, N).await.try_into().ok().expect("as many")
}

async fn registered(broker: &Broker, count: usize) -> Vec<Member> {
    let group = GroupId::random(&SystemRandom);
    let mut made = Vec::new();
    for n in 0..count {
        made.push(Member::new(broker.device(&format!("member{n}@socialink")).await.expect("registers"), group));
    }
    made
}

/// A group of all, joined by all.
async fn group<const N: usize>(broker: &Broker) -> [Member; N] {
    let mut all = members::<N>(broker).await;
    gather(&mut all).await;
    all
}

async fn gather(all: &mut [Member]) {
    let (owner, others) = all.split_first_mut().expect("somebody");
    owner.create().await;
    owner.add(others).await;
    for other in others {
        other.join().await;
        assert_eq!(other.cursor, owner.cursor);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_reaches_fifty_devices_in_the_groups_order() {
    let broker = Broker::start().await.expect("starts");
    let mut all = members::<50>(&broker).await;
    let (owner, others) = all.split_first_mut().expect("somebody");
    owner.create().await;
    let head = owner.add(others).await;
    others[0].join().await;
    assert_eq!(owner.view(), others[0].view());

    let mut streams = Vec::new();
    for one in std::iter::once(&*owner).chain(&*others) {
        let mut stream = one.device.connect().await.expect("connects");
        let said = follow(&mut stream, one.group).await;
        assert_eq!((said.code(), said.seq, said.epoch), (Code::Ok, head, 1));
        streams.push(stream);
    }
    let sends: Vec<_> = (0..20).map(|n| owner.next_send(format!("message {n}").as_bytes())).collect();
    streams[0].frames(sends.iter().cloned().map(client_frame::Frame::GroupSend).collect()).await.expect("sent");
    let mut order = Vec::new();
    for (n, stream) in streams.iter_mut().enumerate() {
        let mut after = head;
        for send in &sends {
            let got = item(stream).await;
            assert_eq!((got.after, got.kind(), got.epoch), (after, GroupItemKind::Message, 1));
            assert_eq!((got.content.clone(), got.client_message_id), (send.content.clone(), send.client_message_id));
            assert_eq!(got.sender_account, &owner.addr().account.as_bytes()[..]);
            after = got.seq;
            if n == 0 {
                order.push(got.seq);
            }
        }
        assert_eq!(order.last(), Some(&after), "the same order for everybody");
    }
    assert_eq!(others[0].catch_up(7).await.len(), 20, "pages hold the same");
    // A repeat is answered the same and has no second place.
    assert_eq!(owner.post(&sends[3]).await.0, StatusCode::OK);
    let last = owner.next_send(b"last");
    assert_eq!(owner.post(&last).await.0, StatusCode::OK);
    assert_eq!(item(&mut streams[7]).await.content, last.content);
    let details = others[5].call(Method::GET, &others[5].path(""), None).await.1;
    assert_eq!((details["members"].as_array().map(Vec::len), details["epoch"].as_u64()), (Some(50), Some(1)), "{details}");
    let listed = others[5].call(Method::GET, "/v1/groups", None).await.1;
    assert_eq!(listed["groups"][0]["group_id"], owner.group.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_commit_of_an_epoch_wins_and_the_other_is_told_of_it() {
    let broker = Broker::start().await.expect("starts");
    let [mut alice, mut bob, mut carol] = group::<3>(&broker).await;
    let mut stream = carol.device.connect().await.expect("connects");
    follow(&mut stream, carol.group).await;
    let (first, second) = (alice.change(&Change::default()), bob.change(&Change::default()));
    let answers = [alice.submit(&first).await, bob.submit(&second).await];
    let [won, lost] = &answers;
    assert_eq!((won.0, won.1["epoch"].as_u64()), (StatusCode::OK, Some(2)));
    assert_eq!(code(lost), (409, "conflict"));
    assert_eq!((lost.1["epoch"].as_u64(), &lost.1["seq"]), (Some(2), &won.1["seq"]), "{}", lost.1);
    // After a lost answer: the winner again, and the loser again.
    assert_eq!(alice.submit(&first).await, answers[0]);
    assert_eq!(code(&bob.submit(&second).await), (409, "conflict"));
    alice.in_group(|group, engine| group.accepted(engine)).expect("pending");
    alice.cursor = won.1["seq"].as_u64().expect("a seq");
    bob.in_group(|group, engine| group.refused(engine)).expect("pending");
    assert_eq!(item(&mut stream).await.content, Bytes::from(first.commit.clone()));
    for other in [&mut bob, &mut carol] {
        other.catch_up(500).await;
        assert_eq!(other.view(), alice.view());
    }
    bob.commit(&Change::default()).await;
    carol.catch_up(500).await;
    assert_eq!(carol.view(), bob.view());
}

/// Commits once, as often as others come first; the epoch that it began, and how often it was refused.
async fn commit_among_others(mut member: Member, ready: Arc<Barrier>) -> (Member, u64, usize) {
    let mut outgoing = member.change(&Change::default());
    ready.wait().await;
    for refused in 0.. {
        let (status, answer) = member.submit(&outgoing).await;
        let (epoch, seq) = (answer["epoch"].as_u64().expect("an epoch"), answer["seq"].as_u64().expect("a seq"));
        if status == StatusCode::OK {
            assert_eq!(epoch, outgoing.epoch);
            member.in_group(|group, engine| group.accepted(engine)).expect("it was pending");
            member.cursor = seq;
            return (member, epoch, refused);
        }
        // It is told how far the group has come, and finds everything up to there.
        assert_eq!(code(&(status, answer)), (409, "conflict"));
        assert!(epoch >= outgoing.epoch);
        member.in_group(|group, engine| group.refused(engine)).expect("it was pending");
        // A while later, as the SDK does it, so that not all try in each epoch.
        tokio::time::sleep(Duration::from_millis(repair::backoff(refused.min(4) as u32, &SystemRandom))).await;
        member.catch_up(500).await;
        assert!(member.view().0 >= epoch && member.cursor >= seq);
        outgoing = member.change(&Change::default());
    }
    unreachable!("it tries for ever")
}

/// `SEALPOST_TEST_MEMBERS=50` is the full size: some minutes without optimization, since each takes in the commits of all.
#[tokio::test(flavor = "multi_thread")]
async fn commits_of_all_members_at_once_have_one_winner_an_epoch_and_all_get_through() {
    let count = std::env::var("SEALPOST_TEST_MEMBERS").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    let broker = Broker::start().await.expect("starts");
    let mut all = registered(&broker, count).await;
    gather(&mut all).await;
    let (begun, cursor) = (1, all[0].cursor);
    let ready = Arc::new(Barrier::new(count));
    let commits: Vec<_> = all.into_iter().map(|member| tokio::spawn(commit_among_others(member, Arc::clone(&ready)))).collect();
    let (mut members, mut won, mut refused) = (Vec::new(), BTreeSet::new(), 0);
    for commit in commits {
        let (member, epoch, conflicts) = commit.await.expect("it gets through");
        assert!(won.insert(epoch), "one winner an epoch");
        refused += conflicts;
        members.push(member);
    }
    let end = begun + count as u64;
    assert!(won.into_iter().eq(begun + 1..=end));
    let mut views = BTreeSet::new();
    for member in &mut members {
        member.catch_up(500).await;
        views.insert(member.view());
    }
    assert_eq!(views.len(), 1, "one group");
    assert_eq!(views.first().expect("one").0, end);
    let page = members[0].page(cursor, 500).await;
    let epochs: Vec<u64> = page["items"].as_array().expect("items").iter().map(|item| item["epoch"].as_u64().expect("an epoch")).collect();
    assert!(epochs.into_iter().eq(begun..end), "each epoch was ended once");
    println!("{refused} commits came too late");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_removed_gets_the_commit_and_then_nothing() {
    let broker = Broker::start().await.expect("starts");
    let [mut alice, mut bob, mut carol] = group::<3>(&broker).await;
    let mut stream = bob.device.connect().await.expect("connects");
    follow(&mut stream, bob.group).await;
    let removal = alice.commit(&Change { remove_accounts: vec![bob.addr().account], ..Change::default() }).await;
    assert_eq!(item(&mut stream).await.seq, removal);
    let send = alice.next_send(b"without Bob");
    assert_eq!(alice.post(&send).await.0, StatusCode::OK);
    carol.catch_up(10).await;
    assert!(stream.silent(Duration::from_millis(300)).await.is_ok());
    assert_eq!(follow(&mut stream, bob.group).await.code(), Code::Forbidden);
    let send = bob.next_send(b"still here?");
    assert_eq!(code(&bob.post(&send).await), (403, "forbidden"));
    stream.frames(vec![client_frame::Frame::GroupSend(send.clone())]).await.expect("sent");
    assert_eq!(stream.result(send.request_id).await.expect("an answer").code(), Code::Forbidden);
    for path in ["", "/items?after=0", "/info", "/trees/1"] {
        assert_eq!(code(&bob.call(Method::GET, &bob.path(path), None).await), (403, "forbidden"), "{path}");
    }
    assert_eq!(bob.call(Method::GET, "/v1/groups", None).await.1["groups"], json!([]));
    assert_eq!(code(&carol.call(Method::DELETE, &carol.path(""), None).await), (403, "forbidden"));
    assert_eq!(alice.call(Method::DELETE, &alice.path(""), None).await.0, StatusCode::NO_CONTENT);
    assert_eq!(alice.call(Method::DELETE, &alice.path(""), None).await.0, StatusCode::NO_CONTENT);
    let send = carol.next_send(b"anybody?");
    assert_eq!(code(&carol.post(&send).await), (404, "not_found"));
    let page = carol.page(carol.cursor, 10).await;
    let last = page["items"].as_array().and_then(|items| items.last()).expect("an item");
    assert_eq!(last["kind"], "closed", "{page}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_reads_too_slowly_is_told_where_the_group_is_and_pages_have_the_rest() {
    let broker = Broker::start().await.expect("starts");
    let [mut alice, mut bob] = group::<2>(&broker).await;
    let mut slow = bob.device.connect().await.expect("connects");
    follow(&mut slow, bob.group).await;
    let mut stream = alice.device.connect().await.expect("connects");
    let text = vec![7; 200 * 1024];
    let sends: Vec<_> = (0..80).map(|_| alice.next_send(&text)).collect();
    for send in sends.chunks(10) {
        stream.frames(send.iter().cloned().map(client_frame::Frame::GroupSend).collect()).await.expect("sent");
        for one in send {
            assert_eq!(stream.result(one.request_id).await.expect("an answer").code(), Code::Ok);
        }
    }
    // Accepted is not yet handed out.
    let (mut placed, mut behind) = (0, alice.cursor);
    while placed < 80 {
        let page = alice.page(behind, 9).await;
        let items = page["items"].as_array().expect("items");
        placed += items.len();
        behind = items.last().map_or(behind, |item| item["seq"].as_u64().expect("a seq"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    // It reads on: what it was told and what it got leave no hole that it can't see.
    let said = slow.find(|frame| if let Frame::GroupHead(head) = frame { Some(head) } else { None }).await.expect("a head");
    assert_eq!(said.code(), Code::Ok);
    let last = alice.next_send(b"the last one");
    assert_eq!(alice.post(&last).await.0, StatusCode::OK);
    let read = bob.catch_up(9).await;
    assert_eq!((read.len(), read.last().map(Vec::as_slice)), (81, Some(&b"the last one"[..])));
    assert!(bob.cursor > said.seq);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_loses_nothing_and_streams_follow_anew() {
    let mut broker = Broker::start().await.expect("starts");
    let [mut alice, mut bob] = group::<2>(&broker).await;
    let send = alice.next_send(b"before");
    assert_eq!(alice.post(&send).await.0, StatusCode::OK);
    broker.restart().await.expect("starts again");
    let mut stream = bob.device.connect().await.expect("connects");
    let head = follow(&mut stream, bob.group).await;
    assert_eq!((head.code(), head.epoch), (Code::Ok, 1));
    assert!(head.seq > bob.cursor);
    assert_eq!(bob.catch_up(500).await, [b"before"]);
    assert_eq!(alice.post(&send).await.0, StatusCode::OK, "the same again");
    let send = alice.next_send(b"after");
    assert_eq!(alice.post(&send).await.0, StatusCode::OK);
    let got = item(&mut stream).await;
    assert_eq!((got.after, got.content), (bob.cursor, send.content), "the repeat has no place of its own");
    alice.commit(&Change::default()).await;
    // Bob lost his state, and comes back by an external commit.
    let (status, info) = bob.call(Method::GET, &bob.path("/info"), None).await;
    assert_eq!((status, info["epoch"].as_u64()), (StatusCode::OK, Some(2)), "{info}");
    let (info, tree) = (member::unb64(&info["group_info"]), member::unb64(&info["tree"]));
    let outgoing = bob.run(|engine| Ok(engine.rejoin(&info, &tree)?.1)).expect("an external commit");
    let (status, answer) = bob.submit(&outgoing).await;
    assert_eq!((status, answer["epoch"].as_u64()), (StatusCode::OK, Some(3)), "{answer}");
    alice.catch_up(500).await;
    assert_eq!(alice.view(), bob.view());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_strangers_and_bad_members_submit_is_refused_and_changes_nothing() {
    let broker = Broker::start().await.expect("starts");
    let [mut alice, mut bob] = group::<2>(&broker).await;
    let stranger = Member::new(broker.device("stranger@vignette").await.expect("registers"), alice.group);
    let before = alice.page(0, 500).await;
    let good = bob.change(&Change::default());
    let body = Member::commit_body(&good);
    let commits = bob.path("/commits");
    let with = |field: &str, bytes: &[u8]| {
        let mut body = body.clone();
        body[field] = b64(bytes).into();
        body
    };
    // Who is not in it.
    assert_eq!(code(&stranger.call(Method::POST, &commits, Some(body.clone())).await), (403, "forbidden"));
    let send = alice.next_send(b"stolen");
    assert_eq!(code(&stranger.post(&send).await), (403, "forbidden"));
    let proposal = json!({ "proposal": b64(&good.commit[..100]) });
    assert_eq!(code(&stranger.call(Method::POST, &bob.path("/proposals"), Some(proposal.clone())).await), (403, "forbidden"));
    // A commit of somebody else's.
    assert_eq!(code(&alice.call(Method::POST, &commits, Some(body.clone())).await), (403, "forbidden"));
    // Bytes that are none.
    for wrong in [&b"nonsense"[..], &good.commit[..good.commit.len() - 1], &good.group_info] {
        assert_eq!(code(&bob.call(Method::POST, &commits, Some(with("commit", wrong))).await), (400, "bad_request"));
    }
    // In what is signed. The tags at the end are keyed by the group's secret, which the server can't check.
    let (mut flipped, middle) = (good.commit.clone(), good.commit.len() / 2);
    flipped[middle] ^= 1;
    assert_eq!(code(&bob.call(Method::POST, &commits, Some(with("commit", &flipped))).await), (400, "bad_request"));
    assert_eq!(code(&bob.call(Method::POST, &commits, Some(with("commit", b""))).await), (400, "bad_request"));
    // What belongs to it is not what belongs to it.
    let info = bob.call(Method::GET, &bob.path("/info"), None).await.1;
    assert_eq!(
        code(&bob.call(Method::POST, &commits, Some(with("group_info", &member::unb64(&info["group_info"])))).await),
        (400, "bad_request")
    );
    assert_eq!(code(&bob.call(Method::POST, &commits, Some(with("welcome", &good.commit))).await), (400, "bad_request"));
    assert_eq!(code(&bob.call(Method::POST, &bob.path("/proposals"), Some(proposal)).await), (400, "bad_request"));
    // Too large.
    let large = with("commit", &vec![0; limits::COMMIT_BYTES + 1]);
    assert_eq!(code(&bob.call(Method::POST, &commits, Some(large)).await), (413, "too_large"));
    let large = with("commit", &vec![0; limits::GROUP_BODY_BYTES]);
    assert_eq!(code(&bob.call(Method::POST, &commits, Some(large)).await), (413, "too_large"));
    // Messages.
    let handshake = json!({ "client_message_id": 1, "epoch": 1, "content": b64(&good.commit) });
    assert_eq!(code(&bob.call(Method::POST, &bob.path("/messages"), Some(handshake)).await), (400, "bad_request"));
    let early = json!({ "client_message_id": 1, "epoch": 9, "content": b64(&send.content) });
    let answer = bob.call(Method::POST, &bob.path("/messages"), Some(early)).await;
    assert_eq!((code(&answer), answer.1["epoch"].as_u64()), ((409, "conflict"), Some(1)), "{}", answer.1);
    // Groups that are none, or another's.
    let other = stranger.call(Method::POST, "/v1/groups", Some(json!({ "group_info": b64(b"x"), "tree": b64(b"y") }))).await;
    assert_eq!(code(&other), (400, "bad_request"));
    let mut thief = Member::new(stranger.device.clone(), alice.group);
    let created = thief.make();
    let taken = json!({ "group_info": b64(&created.group_info), "tree": b64(&created.tree) });
    assert_eq!(code(&stranger.call(Method::POST, "/v1/groups", Some(taken.clone())).await), (409, "conflict"));
    let mut foreign = Member::new(bob.device.clone(), GroupId::random(&SystemRandom));
    let created = foreign.make();
    let of_bob = json!({ "group_info": b64(&created.group_info), "tree": b64(&created.tree) });
    assert_eq!(code(&stranger.call(Method::POST, "/v1/groups", Some(of_bob)).await), (403, "forbidden"));
    let unknown = Member::new(stranger.device.clone(), GroupId::random(&SystemRandom));
    assert_eq!(code(&unknown.call(Method::GET, &unknown.path("/items"), None).await), (404, "not_found"));

    assert_eq!(alice.page(0, 500).await, before, "nothing changed");
    assert_eq!(bob.submit(&good).await.0, StatusCode::OK, "and what is right is taken");
    let send = alice.next_send(b"of the epoch before");
    assert_eq!(alice.post(&send).await.0, StatusCode::OK);
}
