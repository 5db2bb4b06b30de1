//! Conversations as a person sees them.

use super::*;

#[test]
fn ticks_go_from_pending_to_read() {
    let (mut world, alice, bob) = two();
    world.devices[BOB].online = false;
    world.devices[ALICE].text(bob, "hello");
    assert_eq!(world.devices[ALICE].last(bob).status, Status::Pending);
    world.settle();
    assert_eq!(world.devices[ALICE].last(bob).status, Status::Sent);
    world.devices[BOB].online = true;
    world.settle();
    assert_eq!(world.devices[ALICE].last(bob).status, Status::Delivered);
    assert_eq!(world.devices[BOB].texts(alice), ["hello"]);
    let conversation = &world.devices[BOB].db.conversations().expect("list")[0];
    assert_eq!((conversation.account, conversation.unread), (alice, 1));
    assert_eq!(world.devices[BOB].db.mark_read(alice, u64::MAX).expect("read"), 1);
    assert_eq!(world.devices[BOB].db.mark_read(alice, u64::MAX).expect("read"), 0, "once");
    world.settle();
    assert_eq!(world.devices[ALICE].last(bob).status, Status::Read);
    assert_eq!(world.devices[BOB].db.conversations().expect("list")[0].unread, 0);
}

#[test]
fn all_devices_of_both_sides_have_the_conversation() {
    let mut world = World::new(&[(1, 1), (2, 1), (1, 2), (2, 2)]);
    let (alice, bob) = (account(1), account(2));
    world.devices[ALICE].text(bob, "one");
    world.settle();
    world.devices[2].text(bob, "two");
    world.settle();
    world.devices[3].text(alice, "three");
    world.settle();
    for (at, conversation) in [(0, bob), (2, bob), (1, alice), (3, alice)] {
        assert_eq!(world.devices[at].texts(conversation), ["one", "two", "three"], "device {at}");
    }
    world.devices[2].db.mark_read(bob, u64::MAX).expect("read");
    world.settle();
    assert_eq!(world.devices[ALICE].db.conversations().expect("list")[0].unread, 0, "read on the other device");
    assert_eq!(world.devices[3].last(alice).status, Status::Read);
    assert_eq!(world.devices[BOB].last(alice).status, Status::Read, "all devices learn of it");
}

#[test]
fn notes_to_oneself_reach_the_other_devices() {
    let mut world = World::new(&[(1, 1), (1, 2)]);
    world.devices[0].text(account(1), "milk");
    world.settle();
    assert_eq!((world.devices[0].texts(account(1)), world.devices[1].texts(account(1))), (vec!["milk".into()], vec!["milk".into()]));
    let (mut alone, own) = (World::new(&[(1, 1)]), account(1));
    alone.devices[0].text(own, "milk");
    alone.settle();
    assert_eq!(alone.devices[0].last(own).status, Status::Sent);
}

#[test]
fn edits_deletes_and_reactions_apply_even_before_their_message() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].text(bob, "helo");
    world.settle();
    let message = world.devices[ALICE].last(bob);
    let edit = |id: MessageId, body: &str| Kind::Edit(proto::Edit { message_id: Bytes::copy_from_slice(&id.0), body: body.into() });
    world.devices[ALICE].db.send(bob, edit(message.message_id, "hello"), false).expect("edited");
    let target = Some(content::message_ref(alice, message.message_id));
    let reaction = Kind::Reaction(proto::Reaction { target, emoji: "👍".into(), remove: false });
    world.devices[BOB].db.send(alice, reaction, false).expect("reacted");
    world.settle();
    for (at, conversation) in [(ALICE, bob), (BOB, alice)] {
        let message = world.devices[at].last(conversation);
        assert_eq!((message.body.as_deref(), message.edited), (Some("hello"), true));
        assert_eq!(message.reactions, [(bob, "👍".to_owned())]);
    }
    assert!(matches!(world.devices[BOB].db.send(alice, edit(message.message_id, "mine"), false), Err(Error::NoSuchMessage)));
    // Reversed: the edit is applied before the text arrives.
    let (db, now) = (&world.devices[BOB].db, world.clock.now());
    let text = content::new(content::text("late"), now, None, &SystemRandom);
    let id = content::id_of(&text).expect("valid");
    let early = content::new(edit(id, "late, edited"), now, None, &SystemRandom);
    db.apply(alice.into(), alice, &early, Status::Delivered).expect("kept");
    db.apply(alice.into(), bob, &content::new(edit(id, "forged"), now, None, &SystemRandom), Status::Delivered).expect("kept");
    db.apply(alice.into(), alice, &text, Status::Delivered).expect("applied");
    assert_eq!(world.devices[BOB].last(alice).body.as_deref(), Some("late, edited"));
    let delete = Kind::Delete(proto::Delete { message_id: Bytes::copy_from_slice(&message.message_id.0) });
    world.devices[ALICE].db.send(bob, delete, false).expect("deleted");
    world.settle();
    let first = &world.devices[BOB].db.history(alice, u64::MAX, 10).expect("history")[0];
    assert_eq!((first.body.as_deref(), first.reactions.len()), (None, 0));
}

#[test]
fn expired_messages_are_gone_from_the_file() {
    let (mut world, alice, bob) = two();
    let timer = Kind::ExpireTimer(proto::ExpireTimer { seconds: 60 });
    world.devices[ALICE].db.send(bob, timer, false).expect("set");
    world.settle();
    assert_eq!(world.devices[BOB].db.conversations().expect("list")[0].expire_s, 60);
    world.devices[BOB].text(alice, "BURN AFTER READING");
    world.settle();
    let clock = &world.clock;
    assert_eq!(world.devices[ALICE].db.expire().expect("looked"), (0, None), "not read yet");
    world.devices[ALICE].db.mark_read(bob, u64::MAX).expect("read");
    let due = world.devices[ALICE].db.expire().expect("looked").1.expect("it runs");
    clock.advance(due.saturating_sub(clock.now().0));
    world.settle();
    for at in [ALICE, BOB] {
        let db = &world.devices[at].db;
        db.expire().expect("removed");
        db.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").expect("checkpoint");
        assert!(world.devices[at].events().iter().any(|event| matches!(event, Event::Expired { .. })));
    }
    for file in std::fs::read_dir(world.dir.path()).expect("folder") {
        let bytes = std::fs::read(file.expect("entry").path()).expect("file");
        assert!(!bytes.windows(18).any(|window| window == b"BURN AFTER READING"));
    }
}
