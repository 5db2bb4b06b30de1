//! Groups of the SDK against a real broker over real sockets.

#[path = "support/sdk.rs"]
mod sdk;

use std::time::Duration;

use sdk::{World, live, until};
use sealpost::client::{Client, ConversationId, Event, Membership, Status};
use sealpost::ids::GroupId;

async fn texts(client: &Client, group: GroupId) -> Vec<String> {
    let history = client.history(ConversationId::Group(group), u64::MAX, 10_000).await.expect("history");
    history.into_iter().filter_map(|message| message.body).collect()
}

async fn has(client: &Client, group: GroupId, wanted: &[&str]) {
    until("it has these texts", async || texts(client, group).await == wanted).await;
}

async fn is(client: &Client, group: GroupId, wanted: Membership) {
    let at = async || client.groups().await.expect("list").into_iter().find(|one| one.group == group);
    until("it stands so to the group", async || at().await.is_some_and(|one| one.membership == wanted)).await;
}

async fn epoch(client: &Client, group: GroupId) -> u64 {
    let groups = client.groups().await.expect("list");
    groups.into_iter().find(|one| one.group == group).map_or(0, |one| one.epoch)
}

#[tokio::test(flavor = "multi_thread")]
async fn three_people_write_in_a_group_one_of_them_offline_and_the_broker_restarts() {
    let world = World::new().await;
    let (alice, bob) = (world.device("alice@socialink", "alice").await, world.device("bob@vignette", "bob").await);
    let carol = world.idle("carol@vignette", "carol").await;
    let group = alice.create_group("Berge").await.expect("created");
    let invited = alice.invite(group, &[bob.account(), carol.account()]).await.expect("invited");
    assert_eq!(invited.unreachable, []);
    is(&bob, group, Membership::Member).await;
    alice.send_text(group, "one").await.expect("kept");
    has(&bob, group, &["one"]).await;
    bob.send_text(group, "two").await.expect("kept");
    has(&alice, group, &["one", "two"]).await;
    until("it has its place", async || {
        let last = alice.history(ConversationId::Group(group), u64::MAX, 2).await.expect("history").remove(0);
        last.status == Status::Sent && last.group_seq.is_some()
    })
    .await;
    let world = world.restart(Duration::from_millis(100)).await;
    bob.send_text(group, "three").await.expect("kept");
    alice.rename_group(group, "Hügel").await.expect("renamed");
    has(&alice, group, &["one", "two", "three"]).await;
    carol.start();
    has(&carol, group, &["one", "two", "three"]).await;
    until("the name is known", async || carol.groups().await.expect("list")[0].name.as_deref() == Some("Hügel")).await;
    carol.send_text(group, "here").await.expect("kept");
    has(&alice, group, &["one", "two", "three", "here"]).await;
    has(&bob, group, &["one", "two", "three", "here"]).await;
    // Removed: it is told, and can neither read nor write.
    alice.remove_from_group(group, &[carol.account()]).await.expect("removed");
    is(&carol, group, Membership::Left).await;
    assert!(carol.send_text(group, "still here?").await.is_err());
    alice.send_text(group, "among us").await.expect("kept");
    has(&bob, group, &["one", "two", "three", "here", "among us"]).await;
    assert_eq!(texts(&carol, group).await.len(), 4);
    bob.leave_group(group).await.expect("asked");
    is(&bob, group, Membership::Left).await;
    until("alice is alone", async || alice.group_members(group).await.expect("members").len() == 1).await;
    for client in [&alice, &bob, &carol] {
        client.stop().await;
    }
    world.broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_many_members_at_once_all_get_through() {
    let world = World::new().await;
    let owner = world.device("owner@local", "owner").await;
    let group = owner.create_group("Sturm").await.expect("created");
    let mut members = Vec::new();
    for at in 0..4 {
        members.push(world.device(&format!("member{at}@local"), &format!("member{at}")).await);
    }
    let accounts: Vec<_> = members.iter().map(Client::account).collect();
    owner.invite(group, &accounts).await.expect("invited");
    for member in &members {
        is(member, group, Membership::Member).await;
    }
    let changes = members.iter().map(|member| member.renew_group_keys(group));
    for done in futures_util::future::join_all(changes).await {
        done.expect("it gets through");
    }
    until("all are at the same epoch", async || {
        let owners = epoch(&owner, group).await;
        let mut same = owners == 5;
        for member in &members {
            same &= epoch(member, group).await == owners;
        }
        same
    })
    .await;
    members[0].send_text(group, "after the storm").await.expect("kept");
    for client in members.iter().chain([&owner]) {
        has(client, group, &["after the storm"]).await;
    }
    for client in members.iter().chain([&owner]) {
        client.stop().await;
    }
    world.broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_lost_its_keys_joins_again() {
    let world = World::new().await;
    let alice = world.device("alice@socialink", "alice").await;
    let bob = world.device("bob@vignette", "bob").await;
    let group = alice.create_group("Berge").await.expect("created");
    alice.invite(group, &[bob.account()]).await.expect("invited");
    is(&bob, group, Membership::Member).await;
    bob.close().await;
    // As if an older copy of the file had been put back, without the keys of the group.
    let path = world.path("bob");
    let database = rusqlite::Connection::open(&path).expect("it opens");
    database.execute("DELETE FROM mls WHERE kind != 17", []).expect("deleted");
    drop(database);
    alice.send_text(group, "lost").await.expect("kept");
    alice.renew_group_keys(group).await.expect("renewed");
    let bob = Client::open(&path).await.expect("opened");
    bob.start();
    live(&bob).await;
    until("it joined again", async || {
        bob.events_after(0, 1_000).await.expect("events").iter().any(|(_, event)| matches!(event, Event::GroupRejoined { .. }))
    })
    .await;
    bob.send_text(group, "found").await.expect("kept");
    has(&alice, group, &["lost", "found"]).await;
    alice.send_text(group, "welcome back").await.expect("kept");
    until("it reads again", async || texts(&bob, group).await.contains(&"welcome back".to_owned())).await;
    alice.stop().await;
    bob.stop().await;
    world.broker.stop().await;
}
