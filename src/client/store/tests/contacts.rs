//! Other accounts: identities, devices, trust.

use super::*;

#[test]
fn verified_accounts_are_held_when_their_devices_change() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].text(bob, "first");
    world.settle();
    let (digits, trust) = world.devices[ALICE].db.safety_number(bob).expect("number");
    assert_eq!((digits.len(), trust), (60, Trust::Unverified));
    assert_eq!(digits, world.devices[BOB].db.safety_number(alice).expect("number").0, "both sides see the same");
    assert!(!world.devices[ALICE].db.verify(bob, &digits.replace('1', "2")).expect("compared"));
    assert!(world.devices[ALICE].db.verify(bob, &digits).expect("compared"));
    world.add(2, 2);
    world.devices[ALICE].text(bob, "second");
    world.settle();
    assert_eq!(world.devices[ALICE].last(bob).status, Status::Pending, "held");
    assert!(matches!(world.devices[ALICE].db.send(bob, content::text("third"), true), Err(Error::Unverified)));
    let added = Event::DeviceAdded { account: bob, device: number(2), was_verified: true };
    assert!(world.devices[ALICE].events().contains(&added));
    let (new_digits, trust) = world.devices[ALICE].db.safety_number(bob).expect("number");
    assert!(new_digits != digits && trust == Trust::Changed);
    assert!(world.devices[ALICE].db.verify(bob, &new_digits).expect("compared"));
    world.settle();
    assert_eq!(world.devices[2].texts(alice), ["second"]);
}

#[test]
fn claimed_identities_wait_for_the_directory() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].text(bob, "hello");
    world.settle();
    let claims = world.devices[BOB].db.claims(9).expect("claims");
    assert_eq!(claims, ["user1@local".parse().expect("valid")]);
    assert!(world.devices[BOB].db.conversations().expect("list")[0].identities.is_empty());
    world.devices[BOB].db.confirm(&claims[0], Some(alice)).expect("confirmed");
    assert_eq!(world.devices[BOB].db.conversations().expect("list")[0].identities, claims);
    assert!(world.devices[BOB].db.claims(9).expect("claims").is_empty());
    assert!(world.devices[BOB].events().contains(&Event::Contact { account: alice, identity: claims[0].clone() }));
    // Somebody else's claim to it is settled by the directory, not by what was said last.
    world.devices[BOB].db.claim("user1@local", account(7)).expect("kept");
    world.devices[BOB].db.confirm(&claims[0], Some(alice)).expect("confirmed");
    assert_eq!(world.devices[BOB].db.account_of(&claims[0]).expect("known"), Some(alice));
}
