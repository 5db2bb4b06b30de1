//! What is sent, and what becomes of it.

use super::*;

#[test]
fn a_new_device_is_repaired_with_the_same_id_and_the_old_ciphertext() {
    let (mut world, _, bob) = two();
    world.devices[ALICE].text(bob, "first");
    world.settle();
    world.add(2, 2);
    world.devices[ALICE].text(bob, "second");
    let before = world.devices[ALICE].db.ready(&[], 9).expect("ready").pop().expect("encrypted at once").send;
    world.settle();
    assert_eq!(
        (world.devices[BOB].texts(account(1)), world.devices[2].texts(account(1))),
        (vec!["first".into(), "second".into()], vec!["second".to_owned()])
    );
    let sent = &world.accepted[&(world.devices[ALICE].address, bob, before.client_message_id)];
    assert_eq!(sent.len(), 2);
    assert_eq!(sent[0], before.envelopes[0].content, "the ciphertext of the device that was fine is kept");
    let added = Event::DeviceAdded { account: bob, device: number(2), was_verified: false };
    assert!(world.devices[ALICE].events().contains(&added));
}

#[test]
fn a_device_that_is_gone_is_dropped_and_a_new_installation_gets_a_new_session() {
    let mut world = World::new(&[(1, 1), (2, 1), (2, 2)]);
    let bob = account(2);
    world.devices[ALICE].text(bob, "first");
    world.settle();
    world.devices[BOB].text(account(1), "the old one");
    world.settle();
    world.devices.remove(2);
    let address = world.devices[BOB].address;
    world.devices[BOB] = Device::new(world.dir.path(), &world.clock, address);
    for body in ["second", "third", "fourth"] {
        world.devices[ALICE].text(bob, body);
    }
    world.settle();
    assert_eq!(world.devices[BOB].texts(account(1)), ["second", "third", "fourth"]);
    let changed = Event::IdentityChanged { account: bob, device: number(1), was_verified: false };
    assert_eq!(world.devices[ALICE].events().into_iter().filter(|event| *event == changed).count(), 1, "told once");
    // Nor are its messages taken for those of the one before.
    world.devices[BOB].text(account(1), "the new one");
    world.settle();
    assert_eq!(world.devices[ALICE].texts(bob).last().map(String::as_str), Some("the new one"));
}

#[test]
fn refusals_are_told_and_deleted_accounts_end() {
    let (mut world, _, bob) = two();
    world.devices[ALICE].text(bob, "hello");
    world.directory(ALICE);
    let id = world.devices[ALICE].db.ready(&[], 1).expect("ready")[0].id;
    world.devices[ALICE].db.answered(id, &Answer::of(Code::Blocked)).expect("noted");
    let message = world.devices[ALICE].last(bob);
    assert_eq!((message.status, message.failure), (Status::Failed, Some(Failure::Blocked)));
    world.devices[ALICE].text(bob, "one");
    world.devices[ALICE].text(bob, "two");
    let id = world.devices[ALICE].db.ready(&[], 1).expect("ready")[0].id;
    world.devices[ALICE].db.answered(id, &Answer::of(Code::AccountDeleted)).expect("noted");
    assert_eq!(world.devices[ALICE].last(bob).failure, Some(Failure::AccountDeleted), "all that waited fail");
    assert!(world.devices[ALICE].events().contains(&Event::AccountDeleted { account: bob }));
    assert!(matches!(world.devices[ALICE].db.send(bob, content::text("x"), true), Err(Error::AccountDeleted)));
}

#[test]
fn retries_keep_bytes_and_id_and_order() {
    let (mut world, _, bob) = two();
    world.devices[ALICE].text(bob, "one");
    world.directory(ALICE);
    world.devices[ALICE].text(bob, "two");
    let db = &world.devices[ALICE].db;
    let first = db.ready(&[], 9).expect("ready");
    assert_eq!(first.len(), 2);
    assert_eq!(db.ready(&[first[0].id], 9).expect("ready").len(), 1, "what is in flight is not taken again");
    let wait = Answer { retry_after_ms: 5_000, ..Answer::of(Code::RateLimited) };
    db.answered(first[0].id, &wait).expect("noted");
    assert!(db.ready(&[], 9).expect("ready").is_empty(), "the second waits for the first");
    world.clock.advance(60_000);
    let again = db.ready(&[], 9).expect("ready");
    assert_eq!(again[0].send, first[0].send);
    db.answered(again[0].id, &Answer::of(Code::StaleMessageId)).expect("noted");
    let renewed = db.ready(&[], 9).expect("ready");
    let renewed = renewed.iter().find(|ready| ready.id == again[0].id).expect("still there");
    assert!(renewed.send.client_message_id > first[1].send.client_message_id);
    assert_eq!(renewed.send.envelopes, first[0].send.envelopes);
}

#[test]
fn at_most_a_window_of_ids_is_unanswered() {
    let (mut world, _, bob) = two();
    world.devices[ALICE].text(bob, "0");
    world.settle();
    for n in 0..200 {
        world.devices[ALICE].text(bob, &n.to_string());
    }
    let ready = world.devices[ALICE].db.ready(&[], 1_000).expect("ready");
    assert!(ready.len() as u64 <= crate::limits::MESSAGE_ID_WINDOW && ready.len() > 64, "{}", ready.len());
    world.settle();
    assert_eq!(world.devices[BOB].texts(account(1)).len(), 201);
}

#[test]
fn typing_is_told_and_never_kept() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].db.send_typing(bob, true).expect("dropped: no session yet");
    world.devices[ALICE].text(bob, "hello");
    world.settle();
    world.devices[ALICE].db.send_typing(bob, true).expect("sent");
    world.settle();
    assert_eq!(world.live, [Live::Typing { account: alice, started: true }]);
    assert_eq!(world.devices[ALICE].db.unsent().expect("count"), 0);
    let kept: i64 =
        world.devices[ALICE].db.connection.query_row("SELECT count(*) FROM outgoing WHERE ephemeral", [], |row| row.get(0)).expect("count");
    assert_eq!(kept, 0);
}

#[test]
fn rejected_messages_go_again_under_a_new_id() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].text(bob, "hello");
    world.settle();
    let (id, address) = (world.accepted.keys().next().expect("one").2, world.devices[BOB].address);
    let seq = world.devices[ALICE].seq + 1;
    world.devices[ALICE].db.process(&[receipt(seq, address, ReceiptKind::Rejected, id)]).expect("processed");
    assert_eq!(world.devices[ALICE].db.unsent().expect("count"), 1);
    world.devices[ALICE].seq = seq;
    world.settle();
    assert_eq!(world.devices[BOB].texts(alice), ["hello"], "shown once");
}
