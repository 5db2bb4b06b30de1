//! Who breaks the rules is stopped at home, and by every member.

use super::*;
use crate::mls::rules::Denied;

#[test]
fn a_device_does_not_prepare_what_it_may_not() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1), Device::new(3, 1)];
    group_of(&mut devices);
    let mut stranger = Device::new(4, 1);
    let package = stranger.key_package();
    let denied = |device: &mut Device, change: &Change<'_>| match device.change(change) {
        Err(Error::Denied(denied)) => Some(denied),
        _ => None,
    };
    let member = &mut devices[1];
    assert_eq!(denied(member, &Change { add: vec![(stranger.address, &package)], ..Change::default() }), Some(Denied::NotAllowed));
    assert_eq!(denied(member, &Change { remove_accounts: vec![account(3)], ..Change::default() }), Some(Denied::NotAllowed));
    assert_eq!(denied(member, &Change { name: Some("x"), ..Change::default() }), Some(Denied::NotAllowed));
    assert_eq!(denied(member, &Change { admins: Some(vec![account(2)]), ..Change::default() }), Some(Denied::NotAllowed));
    assert_eq!(denied(member, &Change { remove_accounts: vec![account(9)], ..Change::default() }), Some(Denied::NotMember));
    let long = "x".repeat(crate::limits::GROUP_NAME_CHARS + 1);
    assert!(matches!(devices[0].change(&Change { name: Some(&long), ..Change::default() }), Err(Error::Profile(_))));
    // Nothing of that is left.
    change(&mut devices, 1, &Change::default());
    all_agree(&mut devices);
}

#[test]
fn a_key_package_of_another_device_is_refused() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1), Device::new(3, 1)];
    devices[0].create("Berge");
    let package = devices[1].key_package();
    let other = devices[2].address;
    let refused = devices[0].change(&Change { add: vec![(other, &package)], ..Change::default() });
    assert!(matches!(refused, Err(Error::KeyPackage(key_package::Invalid::Credential))));
    let check = |bytes: &[u8]| key_package::check(bytes, None, now(), &SeededRandom::new(1)).map(|checked| checked.device);
    assert_eq!(check(&package), Ok(devices[1].address));
    for at in 0..package.len() {
        let mut bad = package.clone();
        bad[at] ^= 1;
        assert!(check(&bad).is_err(), "byte {at}");
        assert!(check(&package[..at]).is_err());
    }
    assert_eq!(check(&vec![0; crate::limits::KEY_PACKAGE_BYTES + 1]), Err(key_package::Invalid::TooLarge));
    let later = UnixMillis(now().0 + (crate::limits::KEY_PACKAGE_LIFETIME_S + 1) * 1000);
    let expired = key_package::check(&package, None, later, &SeededRandom::new(1));
    assert!(matches!(expired, Err(key_package::Invalid::Lifetime)));
}

#[test]
fn the_same_device_is_not_added_twice() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1)];
    group_of(&mut devices);
    let package = devices[1].key_package();
    let twice = devices[0].change(&Change { add: vec![(devices[1].address, &package)], ..Change::default() });
    assert!(twice.is_err());
}

#[test]
fn who_only_claims_to_be_a_member_does_not_get_in() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1)];
    group_of(&mut devices);
    let sent = change(&mut devices, 0, &Change::default());
    let tree = devices[0].tree();
    // A stranger, and somebody with another key who says that it is a member's device.
    for claimed in [(7, 1), (2, 2), (2, 1)] {
        let mut stranger = Device::new(claimed.0, claimed.1);
        stranger.random = SeededRandom::new(0xbad);
        match stranger.run(|engine| Ok(engine.rejoin(&sent.group_info, &tree)?.1)) {
            Ok(again) => assert!(matches!(devices[0].receive(&again.commit), Err(Error::Denied(_))), "{claimed:?}"),
            Err(Error::Denied(_)) => assert_eq!(claimed, (2, 1), "a leaf twice is noticed at home"),
            Err(other) => panic!("{other}"),
        }
    }
    change(&mut devices, 0, &Change::default());
    all_agree(&mut devices);
}

#[test]
fn damaged_and_foreign_messages_are_errors_and_change_nothing() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1)];
    group_of(&mut devices);
    let (text, from) = (devices[0].write("heil"), devices[0].address);
    let sent = devices[0].change(&Change::default()).expect("prepared");
    for good in [&text, &sent.commit] {
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(devices[1].receive(&bad).is_err(), "byte {at}");
        }
        assert!(devices[1].receive(&good[..good.len() / 2]).is_err());
    }
    devices[0].accepted();
    devices[1].reads(&text, from, "heil");
    devices[1].receive(&sent.commit).expect("the true one");
    all_agree(&mut devices);
}
