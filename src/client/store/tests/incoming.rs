//! What arrives, and what is wrong with it.

use super::*;

#[test]
fn what_cannot_be_decrypted_is_asked_for_again_and_shown_once() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].text(bob, "zero");
    world.settle();
    world.devices[BOB].text(alice, "ack");
    world.settle();
    // Bob loses his session, as after restoring a backup; Alice does not know.
    world.devices[BOB].db.connection.execute("DELETE FROM sessions", []).expect("deleted");
    world.devices[ALICE].text(bob, "one");
    world.devices[ALICE].text(bob, "two");
    world.settle();
    let mut texts = world.devices[BOB].texts(alice);
    texts.sort();
    assert_eq!(texts, ["ack", "one", "two", "zero"]);
    let undecryptable = |event: &Event| matches!(event, Event::Undecryptable { asked_again: true, .. });
    assert_eq!(world.devices[BOB].events().iter().filter(|event| undecryptable(event)).count(), 2);
    world.devices[ALICE].text(bob, "three");
    world.settle();
    assert_eq!(world.devices[BOB].texts(alice).len(), 5);
}

#[test]
fn transcripts_of_strangers_and_forged_receipts_are_ignored() {
    let (mut world, alice, bob) = two();
    let text = content::new(content::text("forged"), START, None, &SystemRandom);
    let forged = content::new(content::transcript(text, account(9), None, crate::ids::ClientMessageId(1)), START, None, &SystemRandom);
    world.devices[ALICE].db.enqueue(bob, &forged, crate::client::store::outgoing::Sending::default()).expect("kept");
    world.settle();
    assert!(world.devices[BOB].texts(account(9)).is_empty() && world.devices[BOB].texts(alice).is_empty());
    let id = world.devices[ALICE].text(account(9), "to somebody else");
    let read = Kind::Read(proto::ReadReceipt { message_ids: vec![Bytes::copy_from_slice(&id.0)] });
    let read = content::new(read, START, None, &SystemRandom);
    world.devices[ALICE].db.apply(bob.into(), bob, &read, Status::Delivered).expect("applied");
    assert_eq!(world.devices[ALICE].last(account(9)).status, Status::Pending);
}

#[test]
fn gaps_and_expiry_are_told_and_the_cursor_moves() {
    let (mut world, _, bob) = two();
    world.devices[ALICE].text(bob, "hello");
    world.devices[BOB].online = false;
    world.settle();
    let id = world.accepted.keys().next().expect("one").2;
    let device = &world.devices[ALICE];
    let address = world.devices[BOB].address;
    let hello = |cursor| frame(Frame::Hello(Hello { cursor, heartbeat_ms: 0, max_unacked_bytes: 0, server_time_ms: 0 }));
    let gap = frame(Frame::Gap(crate::wire::stream::Gap { from: 3, to: 9, reason: crate::wire::stream::GapReason::GapExpired as i32 }));
    let frames = [hello(0), gap.clone(), receipt(10, address, ReceiptKind::Expired, id), gap];
    assert_eq!(device.db.process(&frames).expect("processed").cursor, Seq(10));
    assert_eq!(device.last(bob).failure, Some(Failure::Expired));
    assert_eq!(device.events().iter().filter(|event| **event == Event::Gap { expired: true }).count(), 1);
    assert_eq!(device.db.process(&[hello(12)]).expect("processed").cursor, Seq(12), "state was set back: said, not hidden");
    assert!(device.events().contains(&Event::Gap { expired: false }));
}
