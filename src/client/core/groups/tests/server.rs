//! What a server makes of a group from its public state.

use std::collections::BTreeSet;

use openmls::prelude::tls_codec::Serialize as _;
use openmls::prelude::{ExternalProposal, ExternalSender, GroupEpoch, GroupId as MlsGroupId, LeafNodeIndex, SenderExtensionIndex};
use openmls_traits::crypto::OpenMlsCrypto as _;
use openmls_traits::signatures::{Signer, SignerError};
use openmls_traits::types::SignatureScheme;

use super::*;
use crate::mls::crypto::Crypto;
use crate::mls::public::{Public, Refused};
use crate::mls::rules::{Actor, Denied};
use crate::mls::welcome;

/// The server's own key, with which it asks for deleted accounts to be removed.
struct ServerKey(Vec<u8>, Vec<u8>, SeededRandom);

impl ServerKey {
    fn new() -> Self {
        let random = SeededRandom::new(99);
        let (private, public) = Crypto::new(&random).signature_key_gen(SignatureScheme::ED25519).expect("a key");
        Self(private, public, random)
    }

    fn sender(&self) -> ExternalSender {
        ExternalSender::new(self.1.as_slice().into(), openmls::prelude::BasicCredential::new(b"server".to_vec()).into())
    }

    fn remove(&self, leaf: u32, epoch: u64) -> Vec<u8> {
        let (group, leaf) = (MlsGroupId::from_slice(GROUP.as_bytes()), LeafNodeIndex::new(leaf));
        let proposal = ExternalProposal::new_remove::<super::super::engine::Provider<'_, '_>>(
            leaf,
            group,
            GroupEpoch::from(epoch),
            self,
            SenderExtensionIndex::new(0),
        );
        proposal.expect("a proposal").tls_serialize_detached().expect("bytes")
    }
}

impl Signer for ServerKey {
    fn sign(&self, payload: &[u8]) -> Result<Vec<u8>, SignerError> {
        Crypto::new(&self.2).sign(SignatureScheme::ED25519, payload, &self.0).map_err(SignerError::CryptoError)
    }

    fn signature_scheme(&self) -> SignatureScheme {
        SignatureScheme::ED25519
    }
}

/// A group of one that a server follows, and a change that adds the others.
fn followed(devices: &mut [Device], server: Option<ExternalSender>) -> Public {
    let created = devices[0].run(|engine| Ok(engine.create(GROUP, "Berge", server, now())?.1)).expect("a group");
    let mut public = Public::create(&created.group_info, &created.tree, &SeededRandom::new(1)).expect("a sound group");
    let packages: Vec<(DeviceAddr, Vec<u8>)> = devices[1..].iter_mut().map(|device| (device.address, device.key_package())).collect();
    let add = packages.iter().map(|(device, bytes)| (*device, bytes.as_slice())).collect();
    let sent = devices[0].change(&Change { add, ..Change::default() }).expect("the owner adds");
    let checked = public.check(&sent.commit, &SeededRandom::new(1)).expect("valid");
    public.merge(checked).expect("merges");
    devices[0].accepted();
    let (welcome, tree) = (sent.welcome.expect("a Welcome"), public.tree().expect("a tree"));
    devices[1..].iter_mut().for_each(|device| device.join(&welcome, &tree).expect("an invitation"));
    all_agree(devices);
    public
}

/// What the server hands to each invited device: the part of the Welcome that is its own.
#[test]
fn each_joiner_joins_with_its_part_of_the_welcome() {
    for (suite, joiners) in [(SUITES[0], 1), (SUITES[0], 9), (SUITES[1], 2), (SUITES[2], 3)] {
        let mut devices: Vec<Device> = (1..=joiners + 1).map(|n| Device::with_suite(n, 1, suite)).collect();
        let created = devices[0].create("Berge");
        let mut public = Public::create(&created.group_info, &created.tree, &SeededRandom::new(1)).expect("a sound group");
        let packages: Vec<(DeviceAddr, Vec<u8>)> = devices[1..].iter_mut().map(|device| (device.address, device.key_package())).collect();
        let add = packages.iter().map(|(device, bytes)| (*device, bytes.as_slice())).collect();
        let sent = devices[0].change(&Change { add, ..Change::default() }).expect("the owner adds");
        let checked = public.check(&sent.commit, &SeededRandom::new(1)).expect("valid");
        let invited = checked.invited.clone();
        public.merge(checked).expect("merges");
        devices[0].accepted();

        let (whole, tree) = (sent.welcome.expect("somebody was added"), public.tree().expect("a tree"));
        let parts = welcome::split(&whole).expect("a Welcome");
        let refs: BTreeSet<&[u8]> = invited.iter().map(|(_, key_package_ref)| key_package_ref.as_slice()).collect();
        assert!(parts.refs().eq(refs), "one secret for each KeyPackage");
        for (at, (device, key_package_ref)) in invited.iter().enumerate() {
            let joiner = devices.iter_mut().find(|one| one.address == *device).expect("it was added");
            let others = invited[(at + 1) % invited.len()].1.as_slice();
            let (own, other) = (parts.for_ref(key_package_ref).expect("a part"), parts.for_ref(others).expect("a part"));
            assert!(own.len() <= whole.len() && (invited.len() == 1 || own.len() < whole.len()));
            if invited.len() > 1 {
                assert!(matches!(joiner.join(&other, &tree), Err(Error::NotForUs)));
            }
            joiner.join(&own, &tree).expect("its own part is enough");
        }
        all_agree(&mut devices);
    }
}

#[test]
fn deleted_accounts_are_taken_out_at_the_servers_word() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1), Device::new(3, 1)];
    let key = ServerKey::new();
    let mut public = followed(&mut devices, Some(key.sender()));
    let proposal = key.remove(0, 1);
    public.propose(&proposal, &SeededRandom::new(1)).expect("its own");
    for device in &mut devices[1..] {
        assert!(matches!(device.receive(&proposal), Ok(Received::Leaving(who)) if who.account == account(1)));
    }
    let sent = devices[1].change(&Change::default()).expect("any member commits it");
    let checked = public.check(&sent.commit, &SeededRandom::new(1)).expect("valid");
    assert_eq!(checked.changes.removed, vec![(Actor::Server, 0)]);
    public.merge(checked).expect("merges");
    devices[1].accepted();
    devices[2].receive(&sent.commit).expect("valid");
    all_agree(&mut devices[1..]);
    assert_eq!(public.roster().expect("a roster").profile.owner, account(2));
    // Nobody else has that word.
    let other = ServerKey(vec![7; 32], Vec::new(), SeededRandom::new(1));
    assert!(public.propose(&other.remove(1, 2), &SeededRandom::new(1)).is_err());
}

#[test]
fn a_saved_group_goes_on_where_it_was() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1)];
    let mut public = followed(&mut devices, None);
    let sent = devices[1].change(&Change::default()).expect("prepared");
    let checked = public.check(&sent.commit, &SeededRandom::new(1)).expect("valid");
    let saved = public.merge_and_save(checked).expect("merges");
    devices[1].accepted();
    devices[0].receive(&sent.commit).expect("valid");
    for end in 0..saved.len() {
        // Cut between two values it may decode, but it is no group then.
        assert!(Public::restore(GROUP, &saved[..end]).is_err());
    }
    let mut restored = Public::restore(GROUP, &saved).expect("as it was");
    assert_eq!((restored.epoch(), restored.tree_hash(), restored.tree()), (public.epoch(), public.tree_hash(), public.tree()));
    let sent = devices[0].change(&Change { name: Some("Hügel"), ..Change::default() }).expect("prepared");
    let checked = restored.check(&sent.commit, &SeededRandom::new(1)).expect("valid");
    restored.merge(checked).expect("merges");
    assert!(restored.matches(&sent.group_info) && !public.matches(&sent.group_info));
}

#[test]
fn what_a_server_refuses() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1), Device::new(3, 1)];
    let mut public = followed(&mut devices, None);
    let random = SeededRandom::new(1);
    let text = devices[0].write("geheim");
    let sent = devices[0].change(&Change::default()).expect("prepared");
    let refused = |public: &Public, bytes: &[u8]| public.check(bytes, &random).map(drop).expect_err("refused");
    assert!(matches!(refused(&public, &text), Refused::Invalid(_)), "not a commit");
    assert!(matches!(refused(&public, &vec![0; crate::limits::COMMIT_BYTES + 1]), Refused::TooLarge));
    // Confirmation tag and membership tag, 33 bytes each, are MACs under secrets of the group: only members can check them, and do.
    const TAGS: usize = 2 * 33;
    for at in 0..sent.commit.len() - TAGS {
        let mut bad = sent.commit.clone();
        bad[at] ^= 1;
        refused(&public, &bad);
    }
    // Somebody else was first.
    let winner = devices[1].change(&Change::default()).expect("prepared");
    let checked = public.check(&winner.commit, &random).expect("valid");
    public.merge(checked).expect("merges");
    devices[1].accepted();
    assert_eq!(refused(&public, &sent.commit), Refused::Epoch { have: 2, got: 1 });
    // A member of another group, and a stranger who joins by itself.
    let mut stranger = Device::new(9, 1);
    let mut others = [Device::new(1, 1), Device::new(4, 1)];
    let foreign = followed(&mut others, None);
    let sent = others[1].change(&Change::default()).expect("prepared");
    assert!(matches!(refused(&public, &sent.commit), Refused::Invalid(_) | Refused::Epoch { .. }));
    drop(foreign);
    let joins = stranger.run(|engine| Ok(engine.rejoin(&winner.group_info, &public.tree().expect("a tree"))?.1)).expect("prepared");
    assert_eq!(refused(&public, &joins.commit), Refused::Denied(Denied::NotMember));
    // A group of nobody's making.
    let created = Device::new(8, 1).create("Fremd");
    let tree = public.tree().expect("a tree");
    assert!(Public::create(&created.group_info, &tree, &random).is_err(), "another group's tree");
    assert!(Public::create(&created.group_info, &created.tree, &random).is_ok());
}
