//! The SDK against a real broker over real sockets.

#[path = "support/sdk.rs"]
mod sdk;

use std::time::{Duration, Instant};

use sdk::{PATIENCE, World, has, history, status, texts, told, until};
use sealpost::client::{Client, Connection, Event, Failure, Live, Status, Trust};
use sealpost::wire::stream::Code;

#[tokio::test(flavor = "multi_thread")]
async fn two_people_on_two_platforms_talk() {
    let world = World::new().await;
    let (alice, bob) = (world.device("alice@socialink", "alice").await, world.device("bob@vignette", "bob").await);
    alice.send_text("bob@vignette", "hello").await.expect("sent");
    has(&bob, alice.account(), &["hello"]).await;
    bob.send_text(alice.account(), "hi").await.expect("sent");
    has(&alice, bob.account(), &["hello", "hi"]).await;
    until("it is delivered", async || history(&alice, bob.account()).await[0].status == Status::Delivered).await;
    bob.mark_read(alice.account(), u64::MAX).await.expect("read");
    until("it is read", async || history(&alice, bob.account()).await[0].status == Status::Read).await;
    let alices = "alice@socialink".parse().expect("an identity");
    until("her name is confirmed", async || bob.conversations().await.expect("list")[0].identities.contains(&alices)).await;
    let mut events = bob.events().await.expect("events");
    let (position, event) = events.next().await.expect("read").expect("an event");
    assert!(matches!(event, Event::Message { message: Some(message), .. } if message.body.as_deref() == Some("hello")));
    events.handled(position).await.expect("noted");
    let mut again = bob.events().await.expect("events");
    assert!(again.next().await.expect("read").is_some_and(|(next, _)| next > position), "handled events do not come again");
    alice.stop().await;
    bob.stop().await;
    world.broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_were_away_catch_up_and_new_ones_are_repaired() {
    let world = World::new().await;
    let alice = world.device("alice@socialink", "alice").await;
    let (bob, tablet) = (world.device("bob@vignette", "bob").await, world.idle("bob@vignette", "tablet").await);
    assert_eq!(bob.account(), tablet.account());
    for n in 0..20 {
        alice.send_text("bob@vignette", &format!("text {n}")).await.expect("sent");
        if n % 5 == 4 {
            bob.send_text(alice.account(), &format!("answer {n}")).await.expect("sent");
            until("it is answered", async || texts(&alice, bob.account()).await.len() == n + 1 + n / 5 + 1).await;
        }
    }
    let all = texts(&alice, bob.account()).await;
    assert_eq!(all.len(), 24);
    let sorted = |mut texts: Vec<String>| {
        texts.sort();
        texts
    };
    tablet.start();
    until("the tablet has both sides", async || texts(&tablet, alice.account()).await.len() == 24).await;
    assert_eq!(sorted(texts(&tablet, alice.account()).await), sorted(all));
    // A third device, and a second one of Alice's, of which nobody knows: the next messages find out (409) and reach all.
    let (laptop, phone) = (world.device("bob@vignette", "laptop").await, world.device("alice@socialink", "phone").await);
    alice.send_text("bob@vignette", "to all of you").await.expect("sent");
    bob.send_text("alice@socialink", "and to all of you").await.expect("sent");
    for (client, with) in [(&laptop, &alice), (&phone, &bob)] {
        until("the new device has both", async || texts(client, with.account()).await.len() == 2).await;
    }
    until("alice is told", async || told(&alice, |event| matches!(event, Event::DeviceAdded { .. })).await).await;
    // All see the same safety number, whichever device they look at.
    let mut numbers = Vec::new();
    for (client, with) in [(&alice, &bob), (&phone, &bob), (&bob, &alice), (&tablet, &alice), (&laptop, &alice)] {
        let number = client.safety_number(with.account()).await.expect("number");
        assert!(number.fresh && number.trust == Trust::Unverified);
        numbers.push(number.digits);
    }
    numbers.dedup();
    assert_eq!(numbers.len(), 1, "{numbers:?}");
    // A device that is revoked is left out, and knows.
    bob.revoke_device(laptop.address().device).await.expect("revoked");
    until("it is signed out", async || *laptop.connection().borrow() == Connection::SignedOut).await;
    alice.send_text("bob@vignette", "without the laptop").await.expect("sent");
    until("it arrives", async || texts(&bob, alice.account()).await.last().is_some_and(|text| text == "without the laptop")).await;
    status(&alice, bob.account(), Status::Delivered).await;
    for client in [alice, bob, tablet, laptop, phone] {
        client.stop().await;
    }
    world.broker.stop().await;
}

/// Far more than is taken into one transaction, so that every boundary on the way is crossed.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_backlog_arrives_whole_and_in_order() {
    const MESSAGES: usize = 4_000;
    let world = World::new().await;
    let (alice, bob) = (world.device("alice@socialink", "alice").await, world.idle("bob@vignette", "bob").await);
    let bobs = alice.resolve("bob@vignette").await.expect("found");
    for first in (0..MESSAGES).step_by(100) {
        let batch: Vec<String> = (first..first + 100).map(|n| n.to_string()).collect();
        assert_eq!(alice.send_texts(bobs, &batch).await.expect("sent").len(), 100);
    }
    until("all are accepted", async || alice.sync_status().await.expect("status").unsent == 0).await;
    let begun = Instant::now();
    bob.start();
    until("it has caught up", async || {
        let status = bob.sync_status().await.expect("status");
        status.connection == Connection::Live && status.newest_event >= MESSAGES as u64
    })
    .await;
    println!("{MESSAGES} messages decrypted and kept in {:?}", begun.elapsed());
    let got = texts(&bob, alice.account()).await;
    assert_eq!(got.len(), MESSAGES);
    assert_eq!(got.iter().enumerate().find(|(n, text)| **text != n.to_string()), None, "in order");
    status(&alice, bobs, Status::Delivered).await;
    alice.stop().await;
    bob.stop().await;
    world.broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_without_a_broker_goes_when_it_is_back() {
    let mut world = World::new().await;
    let (alice, bob) = (world.device("alice@socialink", "alice").await, world.device("bob@vignette", "bob").await);
    alice.send_text("bob@vignette", "0").await.expect("sent");
    has(&bob, alice.account(), &["0"]).await;
    for round in 0..3 {
        for n in 0..10 {
            alice.send_text(bob.account(), &format!("{round}.{n}")).await.expect("kept");
        }
        world = world.restart(Duration::from_millis(200)).await;
    }
    until("all arrived", async || texts(&bob, alice.account()).await.len() == 31).await;
    let expected: Vec<String> = std::iter::once("0".to_owned()).chain((0..30).map(|n| format!("{}.{}", n / 10, n % 10))).collect();
    assert_eq!(texts(&bob, alice.account()).await, expected, "in order, each once");
    status(&alice, bob.account(), Status::Delivered).await;
    until("nothing is left", async || alice.sync_status().await.expect("status").unsent == 0).await;
    alice.stop().await;
    bob.stop().await;
    world.broker.stop().await;
}

/// A client that is dropped at any moment keeps what was committed and nothing else, like one whose process was killed.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_vanish_again_and_again_show_each_message_once() {
    let world = World::new().await;
    let alice = world.device("alice@socialink", "alice").await;
    let mut bob = world.device("bob@vignette", "bob").await;
    let bobs = bob.account();
    let mut sent = 0;
    for round in 0..25u64 {
        for _ in 0..8 {
            alice.send_text(bobs, &format!("{sent}")).await.expect("sent");
            sent += 1;
        }
        bob.send_text(alice.account(), &format!("from bob {round}")).await.expect("sent");
        tokio::time::sleep(Duration::from_millis(round * 7 % 40)).await;
        drop(bob);
        bob = loop {
            // The one before holds the file until its tasks have ended.
            match Client::open(world.path("bob")).await {
                Ok(client) => break client,
                Err(error) => assert!(error.to_string().contains("in use"), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        bob.start();
    }
    until("bob has all", async || history(&bob, alice.account()).await.len() == sent + 25).await;
    until("alice has all", async || history(&alice, bobs).await.len() == sent + 25).await;
    let events = bob.events_after(0, 10_000).await.expect("events");
    let mut shown: Vec<usize> = events
        .iter()
        .filter_map(|(_, event)| match event {
            Event::Message { message: Some(message), .. } => message.body.as_ref()?.parse().ok(),
            _ => None,
        })
        .collect();
    assert_eq!(shown.len(), sent, "one event a message");
    shown.sort_unstable();
    assert_eq!(shown, (0..sent).collect::<Vec<_>>());
    alice.stop().await;
    bob.stop().await;
    world.broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn typing_edits_reactions_deletes_and_disappearing_messages() {
    let world = World::new().await;
    let (alice, bob) = (world.device("alice@socialink", "alice").await, world.device("bob@vignette", "bob").await);
    alice.send_text("bob@vignette", "helo").await.expect("sent");
    has(&bob, alice.account(), &["helo"]).await;
    let mut seen = bob.live();
    alice.typing(bob.account(), true).await.expect("told");
    let typing = async {
        loop {
            if let Live::Typing { account, started } = seen.recv().await.expect("live") {
                return (account, started);
            }
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, typing).await.expect("in time"), (alice.account(), true));
    let message = history(&alice, bob.account()).await.pop().expect("there");
    alice.edit(&message, "hello").await.expect("edited");
    has(&bob, alice.account(), &["hello"]).await;
    bob.react(&history(&bob, alice.account()).await[0], Some("👍")).await.expect("reacted");
    until("the reaction is there", async || history(&alice, bob.account()).await[0].reactions == [(bob.account(), "👍".to_owned())]).await;
    bob.reply(alice.account(), &history(&bob, alice.account()).await[0], "you too").await.expect("sent");
    has(&alice, bob.account(), &["hello", "you too"]).await;
    assert_eq!(history(&alice, bob.account()).await[1].reply_to, Some((alice.account(), message.message_id)));
    alice.delete(&message).await.expect("deleted");
    has(&bob, alice.account(), &["you too"]).await;
    alice.set_expire_timer(bob.account(), 1).await.expect("set");
    alice.send_text(bob.account(), "gone in a second").await.expect("sent");
    has(&bob, alice.account(), &["you too", "gone in a second"]).await;
    has(&alice, bob.account(), &["you too"]).await;
    assert_eq!(texts(&bob, alice.account()).await.len(), 2, "not read yet");
    bob.mark_read(alice.account(), u64::MAX).await.expect("read");
    has(&bob, alice.account(), &["you too"]).await;
    alice.stop().await;
    bob.stop().await;
    world.broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_blocks_and_deleted_accounts() {
    let world = World::new().await;
    let (alice, bob) = (world.device("alice@socialink", "alice").await, world.device("bob@vignette", "bob").await);
    let unknown = alice.send_text("nobody@vignette", "hello").await.expect_err("refused");
    assert_eq!(unknown.code(), Some(Code::NotFound));
    alice.link_identity(&world.token("alice@vignette").await).await.expect("linked");
    assert_eq!(alice.identities().await.expect("list").len(), 2);
    assert_eq!(bob.resolve("alice@vignette").await.expect("found"), alice.account());
    alice.rename_device(alice.address().device, "Pixel").await.expect("renamed");
    assert_eq!(alice.devices().await.expect("list")[0].name, "Pixel");
    alice.send_text("bob@vignette", "hello").await.expect("sent");
    has(&bob, alice.account(), &["hello"]).await;
    bob.block(alice.account()).await.expect("blocked");
    assert_eq!(bob.blocked().await.expect("list"), [alice.account()]);
    alice.send_text("bob@vignette", "are you there?").await.expect("kept");
    status(&alice, bob.account(), Status::Failed).await;
    assert_eq!(history(&alice, bob.account()).await[1].failure, Some(Failure::Blocked));
    bob.unblock(alice.account()).await.expect("unblocked");
    alice.send_text("bob@vignette", "good").await.expect("sent");
    has(&bob, alice.account(), &["hello", "good"]).await;
    let (account, path) = (bob.account(), world.path("bob"));
    bob.delete_account().await.expect("deleted");
    assert!(told(&bob, |event| *event == Event::SignedOut).await);
    drop(bob);
    alice.send_text(account, "goodbye").await.expect("kept");
    status(&alice, account, Status::Failed).await;
    assert_eq!(history(&alice, account).await.pop().expect("there").failure, Some(Failure::AccountDeleted));
    assert!(told(&alice, |event| *event == Event::AccountDeleted { account }).await);
    assert!(alice.send_text(account, "again").await.is_err());
    // What was written stays readable here, signed out or not.
    let mut bob = None;
    until("the file is free", async || {
        bob = Client::open(&path).await.ok();
        bob.is_some()
    })
    .await;
    let bob = bob.expect("opened");
    assert_eq!(texts(&bob, alice.account()).await, ["hello", "good"]);
    bob.start();
    until("it stays signed out", async || *bob.connection().borrow() == Connection::SignedOut).await;
    alice.stop().await;
    bob.stop().await;
    world.broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn verified_people_are_held_until_somebody_looks() {
    let world = World::new().await;
    let (alice, bob) = (world.device("alice@socialink", "alice").await, world.device("bob@vignette", "bob").await);
    alice.send_text("bob@vignette", "hello").await.expect("sent");
    has(&bob, alice.account(), &["hello"]).await;
    let number = alice.safety_number(bob.account()).await.expect("number");
    assert!(alice.verify(bob.account(), &number.digits).await.expect("compared"));
    let tablet = world.device("bob@vignette", "tablet").await;
    alice.send_text("bob@vignette", "secret").await.expect("kept: she does not know yet");
    let warned = |event: &Event| matches!(event, Event::DeviceAdded { was_verified: true, .. });
    until("she is warned", async || told(&alice, warned).await).await;
    assert_eq!(alice.conversations().await.expect("list")[0].trust, Trust::Changed);
    assert!(alice.send_text("bob@vignette", "more").await.is_err());
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((texts(&bob, alice.account()).await.len(), texts(&tablet, alice.account()).await.len()), (1, 0), "nothing left");
    let number = alice.safety_number(bob.account()).await.expect("number");
    assert_eq!(number.digits, tablet.safety_number(alice.account()).await.expect("number").digits);
    assert!(alice.verify(bob.account(), &number.digits).await.expect("compared"));
    has(&bob, alice.account(), &["hello", "secret"]).await;
    has(&tablet, alice.account(), &["secret"]).await;
    for client in [alice, bob, tablet] {
        client.stop().await;
    }
    world.broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_refilled_when_they_run_low() {
    let world = World::new().await;
    let bob = world.device("bob@vignette", "bob").await;
    // Many people write to Bob for the first time: each takes one-time keys, of which 100 were published.
    let mut people = Vec::new();
    for n in 0..85 {
        let person = world.idle(&format!("p{n}@local"), &format!("p{n}")).await;
        person.start();
        person.send_text("bob@vignette", &format!("hello from {n}")).await.expect("sent");
        people.push(person);
    }
    until("all arrived", async || bob.conversations().await.expect("list").iter().filter(|c| c.last.is_some()).count() == 85).await;
    for person in people {
        person.stop().await;
    }
    bob.stop().await;
    drop(bob);
    let mut made = 0;
    until("the file is free", async || {
        let read = rusqlite::Connection::open(world.path("bob"))
            .and_then(|file| file.query_row("SELECT max(id), count(*) FROM prekeys", [], |row| Ok((row.get(0)?, row.get(1)?))));
        let (highest, left): (i64, i64) = read.unwrap_or_default();
        made = left;
        highest == 200
    })
    .await;
    assert_eq!(made, 115, "a used key is gone for good");
    world.broker.stop().await;
}
