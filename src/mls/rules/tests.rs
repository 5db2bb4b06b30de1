use super::*;
use crate::ids::DeviceId;

const OWNER: u8 = 1;
const ADMIN: u8 = 2;
const OTHER_ADMIN: u8 = 3;
const MEMBER: u8 = 4;
const OTHER: u8 = 5;
const STRANGER: u8 = 9;

fn account(byte: u8) -> AccountId {
    AccountId::from_bytes([byte; 16])
}

fn device(byte: u8, number: u32) -> DeviceAddr {
    DeviceAddr { account: account(byte), device: DeviceId::new(number).expect("a device number") }
}

fn by(byte: u8) -> Actor {
    Actor::Member(device(byte, 1))
}

/// Five accounts with two devices each; account n has leaves 2n-2 and 2n-1.
fn roster() -> Roster {
    let profile = Profile { owner: account(OWNER), admins: vec![account(ADMIN), account(OTHER_ADMIN)], sealed_name: vec![1] };
    let leaves = (OWNER..=OTHER).flat_map(|n| [device(n, 1), device(n, 2)]).zip(0..).map(|(device, leaf)| (leaf, device)).collect();
    Roster { profile, leaves }
}

fn first_leaf(byte: u8) -> u32 {
    u32::from(byte) * 2 - 2
}

fn nothing(byte: u8) -> Changes {
    Changes { committer: by(byte), added: Vec::new(), removed: Vec::new(), profile: None }
}

fn removing(by_: u8, whom: u8) -> Changes {
    Changes { removed: vec![(by(by_), first_leaf(whom)), (by(by_), first_leaf(whom) + 1)], ..nothing(by_) }
}

/// With the profile that the removals make necessary.
fn with_roles(mut changes: Changes) -> Changes {
    let mut left = roster();
    for (_, leaf) in &changes.removed {
        left.leaves.remove(leaf);
    }
    let Actor::Member(_) = changes.committer else { panic!("a member commits") };
    changes.profile = Some((changes.committer, left.profile.among(&left.accounts())));
    changes
}

fn with_profile(by_: u8, change: impl FnOnce(&mut Profile)) -> Changes {
    let mut profile = roster().profile;
    change(&mut profile);
    Changes { profile: Some((by(by_), profile)), ..nothing(by_) }
}

fn verdict(changes: &Changes) -> Result<(), Denied> {
    roster().apply(changes).map(|after| assert_eq!(after.check(), Ok(())))
}

#[test]
fn who_adds() {
    let adding = |by_: u8, whom: DeviceAddr| Changes { added: vec![(by(by_), whom)], ..nothing(by_) };
    for (who, new_account, own_device) in [(OWNER, Ok(()), Ok(())), (ADMIN, Ok(()), Ok(())), (MEMBER, Err(Denied::NotAllowed), Ok(()))] {
        assert_eq!(verdict(&adding(who, device(STRANGER, 1))), new_account);
        assert_eq!(verdict(&adding(who, device(who, 3))), own_device);
    }
    assert_eq!(verdict(&adding(MEMBER, device(OTHER, 3))), Err(Denied::NotAllowed), "another account's device");
    assert_eq!(verdict(&adding(OWNER, device(MEMBER, 2))), Err(Denied::Twice));
    let by_server = Changes { added: vec![(Actor::Server, device(STRANGER, 1))], ..nothing(OWNER) };
    assert_eq!(verdict(&by_server), Err(Denied::NotAllowed));
    let eleventh = Changes { added: (3..=11).map(|n| (by(OWNER), device(MEMBER, n))).collect(), ..nothing(OWNER) };
    assert_eq!(verdict(&eleventh), Err(Denied::Full));
}

#[test]
fn who_removes() {
    for (who, whom, allowed) in [
        (OWNER, ADMIN, true),
        (OWNER, MEMBER, true),
        (ADMIN, MEMBER, true),
        (ADMIN, OTHER_ADMIN, false),
        (ADMIN, OWNER, false),
        (MEMBER, OTHER, false),
        (MEMBER, OWNER, false),
    ] {
        assert_eq!(verdict(&with_roles(removing(who, whom))).is_ok(), allowed, "{who} removes {whom}");
    }
    let own_device = Changes { removed: vec![(by(MEMBER), first_leaf(MEMBER) + 1)], ..nothing(MEMBER) };
    assert_eq!(verdict(&own_device), Ok(()));
    let nobody = Changes { removed: vec![(by(OWNER), 99)], ..nothing(OWNER) };
    assert_eq!(verdict(&nobody), Err(Denied::NotMember));
}

#[test]
fn who_leaves_or_is_deleted_is_removed_by_anybody_and_takes_its_role_along() {
    for who in [OWNER, ADMIN, OTHER] {
        for asked in [by(who), Actor::Server] {
            let leaving = Changes { removed: vec![(asked, first_leaf(who)), (asked, first_leaf(who) + 1)], ..nothing(MEMBER) };
            assert_eq!(verdict(&with_roles(leaving.clone())), Ok(()));
            assert_eq!(verdict(&leaving), if who == OTHER { Ok(()) } else { Err(Denied::Roles) }, "without the new roles");
            let first = Changes { removed: vec![(asked, first_leaf(who))], ..nothing(MEMBER) };
            assert_eq!(verdict(&first), Ok(()), "a device is left");
        }
    }
    // Whoever commits can't use the occasion.
    let mut leaving = with_roles(Changes { removed: vec![(by(OWNER), 0), (by(OWNER), 1)], ..nothing(MEMBER) });
    let Some((_, profile)) = &mut leaving.profile else { panic!("with a profile") };
    assert_eq!(profile.owner, account(ADMIN));
    profile.owner = account(MEMBER);
    assert_eq!(verdict(&leaving), Err(Denied::NotAllowed));
}

#[test]
fn who_changes_roles_and_name() {
    let renamed = |who| with_profile(who, |profile| profile.sealed_name = vec![2]);
    assert_eq!([OWNER, ADMIN, MEMBER].map(|who| verdict(&renamed(who)).is_ok()), [true, true, false]);
    let appointed = |who| with_profile(who, |profile| profile.admins.push(account(MEMBER)));
    assert_eq!([OWNER, ADMIN, MEMBER].map(|who| verdict(&appointed(who)).is_ok()), [true, false, false]);
    let passed_on = |who| with_profile(who, |profile| profile.owner = account(MEMBER));
    assert_eq!([OWNER, ADMIN, MEMBER].map(|who| verdict(&passed_on(who)).is_ok()), [true, false, false]);
    assert_eq!(verdict(&with_profile(ADMIN, |profile| profile.admins.retain(|a| *a != account(ADMIN)))), Ok(()), "steps down");
    assert_eq!(verdict(&with_profile(ADMIN, |profile| profile.admins.retain(|a| *a != account(OTHER_ADMIN)))), Err(Denied::NotAllowed));
    assert_eq!(verdict(&with_profile(OWNER, |profile| profile.admins.push(account(STRANGER)))), Err(Denied::Roles), "not in the group");
    let by_server = Changes { profile: Some((Actor::Server, roster().profile)), ..nothing(OWNER) };
    assert_eq!(verdict(&by_server), Err(Denied::NotAllowed));
}

#[test]
fn who_joins_by_itself() {
    let joining = |device: DeviceAddr, removed: Vec<u32>| Changes {
        committer: Actor::Joiner(device),
        added: Vec::new(),
        removed: removed.into_iter().map(|leaf| (Actor::Joiner(device), leaf)).collect(),
        profile: None,
    };
    assert_eq!(verdict(&joining(device(MEMBER, 3), vec![])), Err(Denied::NotMember), "a device that nobody added");
    assert_eq!(verdict(&joining(device(MEMBER, 1), vec![first_leaf(MEMBER)])), Ok(()), "a device that lost its state");
    assert_eq!(verdict(&joining(device(MEMBER, 1), vec![])), Err(Denied::Twice));
    assert_eq!(verdict(&joining(device(MEMBER, 1), vec![first_leaf(OTHER)])), Err(Denied::NotAllowed));
    assert_eq!(verdict(&joining(device(STRANGER, 1), vec![])), Err(Denied::NotMember));
    assert_eq!(verdict(&Changes { committer: Actor::Server, ..nothing(OWNER) }), Err(Denied::NotAllowed));
}

#[test]
fn a_group_takes_as_many_accounts_as_promised_and_not_one_more() {
    let adding = |count: usize| {
        let accounts = (0..count as u128).map(|n| AccountId::from_bytes((n + (1 << 100)).to_be_bytes()));
        let added = accounts.map(|account| (by(OWNER), DeviceAddr { account, device: DeviceId::new(1).expect("1") })).collect();
        Changes { added, ..nothing(OWNER) }
    };
    assert_eq!(verdict(&adding(limits::GROUP_ACCOUNTS - 5)), Ok(()));
    assert_eq!(verdict(&adding(limits::GROUP_ACCOUNTS - 4)), Err(Denied::Full));
}
