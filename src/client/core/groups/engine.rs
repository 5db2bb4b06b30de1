//! This device in groups: its KeyPackages, and how it comes to be in a group.

use openmls::group::JoinBuilder;
use openmls::prelude::tls_codec::{Deserialize as _, Serialize as _};
use openmls::prelude::{
    Ciphersuite, Extension, ExtensionType, Extensions, ExternalCommitBuilder, ExternalSender, GroupId as MlsGroupId, KeyPackage,
    LeafNodeParameters, Lifetime, MlsGroup, MlsGroupJoinConfig, MlsMessageBodyIn, MlsMessageIn, OpenMlsProvider,
    PURE_PLAINTEXT_WIRE_FORMAT_POLICY, ProcessedWelcome, RatchetTreeIn, RequiredCapabilitiesExtension, SenderRatchetConfiguration,
    UnknownExtension, WelcomeError,
};

use zeroize::Zeroizing;

use super::group::Group;
use super::signer::Signer;
use super::{Created, Error, Outgoing, group_info};
use crate::client::core::state::{StateKey, StateTx};
use crate::clock::{Random, UnixMillis};
use crate::ids::{DeviceAddr, GroupId};
use crate::limits;
use crate::mls::crypto::{Crypto, DEFAULT_SUITE};
use crate::mls::key_package;
use crate::mls::profile::{self, NAME_KEY, NameKey, PROFILE, Profile};
use crate::mls::rules::{Denied, Roster};
use crate::mls::storage::{self, Backend, Kind, Storage};

/// The state of a transaction, as openmls's storage rests on it.
pub(super) struct TxState<'t, 's> {
    tx: &'t StateTx<'s>,
    unsaved: bool,
}

impl Backend for TxState<'_, '_> {
    fn get(&self, kind: Kind, key: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, storage::Error> {
        self.tx.get(&StateKey::Mls { kind, key: key.to_vec() }).map_err(|error| storage::Error(error.0))
    }

    fn put(&self, kind: Kind, key: Vec<u8>, mut value: Zeroizing<Vec<u8>>) {
        self.tx.put(StateKey::Mls { kind, key }, std::mem::take(&mut *value));
    }

    fn delete(&self, kind: Kind, key: Vec<u8>) {
        self.tx.delete(StateKey::Mls { kind, key });
    }

    fn keeps(&self, kind: Kind) -> bool {
        // What an open group reads while it goes on.
        !self.unsaved || matches!(kind, Kind::KeyPackage | Kind::EncryptionKeyPair | Kind::EncryptionEpochKeyPairs | Kind::Psk)
    }
}

/// What openmls works with: one transaction, and randomness.
pub(super) struct Provider<'t, 's> {
    crypto: Crypto<'t>,
    storage: Storage<TxState<'t, 's>>,
}

impl<'t, 's> OpenMlsProvider for Provider<'t, 's> {
    type CryptoProvider = Crypto<'t>;
    type RandProvider = Crypto<'t>;
    type StorageProvider = Storage<TxState<'t, 's>>;

    fn storage(&self) -> &Self::StorageProvider {
        &self.storage
    }

    fn crypto(&self) -> &Self::CryptoProvider {
        &self.crypto
    }

    fn rand(&self) -> &Self::RandProvider {
        &self.crypto
    }
}

/// This device, for the length of one transaction.
pub struct Engine<'t, 's> {
    pub(super) tx: &'t StateTx<'s>,
    pub(super) random: &'t dyn Random,
    pub(super) provider: Provider<'t, 's>,
    pub(super) own: DeviceAddr,
    suite: Ciphersuite,
}

impl<'t, 's> Engine<'t, 's> {
    /// Over a transaction of a registered device.
    pub fn new(tx: &'t StateTx<'s>, random: &'t dyn Random) -> Result<Self, Error> {
        let own = tx.own_address()?.ok_or(Error::NotMember)?;
        let provider = Provider { crypto: Crypto::new(random), storage: Storage(TxState { tx, unsaved: false }) };
        Ok(Self { tx, random, provider, own, suite: DEFAULT_SUITE })
    }

    /// The same with another cipher suite for what is made: KeyPackages and groups.
    #[must_use]
    pub fn with_suite(mut self, suite: Ciphersuite) -> Self {
        self.suite = suite;
        self
    }

    /// The same for groups that are never loaded: they live as long as what holds them, and of what becomes of them only the keys that
    /// they read again are kept. Encoding the rest takes longer than everything else that a message costs a large group.
    #[must_use]
    pub fn unsaved(mut self) -> Self {
        self.provider.storage.0.unsaved = true;
        self
    }

    pub(super) fn signer(&self, suite: Ciphersuite) -> Result<Signer<'t>, Error> {
        Signer::load(self.tx, suite, self.random)
    }

    /// New KeyPackages to publish, each to be used once. Their private keys are in this transaction until one is used.
    pub fn key_packages(&self, count: usize, now: UnixMillis) -> Result<Vec<Vec<u8>>, Error> {
        (0..count).map(|_| self.key_package(false, now)).collect()
    }

    /// A new KeyPackage of last resort: handed out when no other is left, any number of times.
    pub fn last_resort_key_package(&self, now: UnixMillis) -> Result<Vec<u8>, Error> {
        self.key_package(true, now)
    }

    fn key_package(&self, last_resort: bool, now: UnixMillis) -> Result<Vec<u8>, Error> {
        let signer = self.signer(self.suite)?;
        let builder = KeyPackage::builder().leaf_node_capabilities(key_package::capabilities()).key_package_lifetime(lifetime(now));
        let builder = if last_resort { builder.mark_as_last_resort() } else { builder };
        let made = builder.build(self.suite, &self.provider, &signer, signer.credential(self.own)).map_err(Error::invalid)?;
        Ok(key_package::encode(made.into_key_package())?)
    }

    /// Creates a group with this device alone in it and its account as the owner. `server` may propose to remove deleted accounts.
    pub fn create(&self, id: GroupId, name: &str, server: Option<ExternalSender>, now: UnixMillis) -> Result<(Group, Created), Error> {
        let (signer, name_key) = (self.signer(self.suite)?, NameKey::random(self.random));
        let sealed_name = profile::seal_name(name, &name_key, id, self.random)?;
        let profile = Profile { owner: self.own.account, admins: Vec::new(), sealed_name };
        let required = RequiredCapabilitiesExtension::new(&[ExtensionType::Unknown(PROFILE)], &[], &[]);
        let mut extensions =
            vec![Extension::RequiredCapabilities(required), Extension::Unknown(PROFILE, UnknownExtension(profile.encode()))];
        extensions.extend(server.map(|server| Extension::ExternalSenders(vec![server])));
        let mls = MlsGroup::builder()
            .with_group_id(mls_id(id))
            .ciphersuite(self.suite)
            .with_wire_format_policy(PURE_PLAINTEXT_WIRE_FORMAT_POLICY)
            .use_ratchet_tree_extension(false)
            .max_past_epochs(limits::PAST_EPOCHS)
            .sender_ratchet_configuration(ratchets())
            .lifetime(lifetime(now))
            .with_capabilities(key_package::capabilities())
            .with_group_context_extensions(Extensions::from_vec(extensions).map_err(Error::invalid)?)
            .build(&self.provider, &signer, signer.credential(self.own))
            .map_err(Error::invalid)?;
        self.tx.put(StateKey::GroupNameKey(id), name_key.as_bytes().to_vec());
        let group_info = mls.export_group_info(&self.provider.crypto, &signer, false).map_err(Error::invalid)?;
        let created = Created {
            group_info: group_info.tls_serialize_detached().map_err(Error::invalid)?,
            tree: mls.export_ratchet_tree().tls_serialize_detached().map_err(Error::invalid)?,
        };
        Ok((Group::new(id, mls), created))
    }

    /// A group that this device is in, as the transaction sees it.
    pub fn load(&self, id: GroupId) -> Result<Option<Group>, Error> {
        Ok(MlsGroup::load(&self.provider.storage, &mls_id(id))?.map(|mls| Group::new(id, mls)))
    }

    /// Joins by invitation: a Welcome (an MLSMessage) and the tree of its epoch. `replace` what this device has of the group; without it
    /// a group that it is in already is an error.
    pub fn join(&self, welcome: &[u8], tree: &[u8], replace: bool) -> Result<Group, Error> {
        let MlsMessageBodyIn::Welcome(welcome) = message(welcome)? else { return Err(Error::invalid("not a Welcome")) };
        let processed = ProcessedWelcome::new_from_welcome(&self.provider, &config(), welcome).map_err(|error| match error {
            WelcomeError::NoMatchingKeyPackage | WelcomeError::JoinerSecretNotFound => Error::NotForUs,
            WelcomeError::StorageError(error) => error.into(),
            other => Error::invalid(other),
        })?;
        // Read before the signature is checked, used after it.
        let key = processed.unverified_group_info().extensions().unknown(NAME_KEY).map(|key| NameKey::from_slice(&key.0)).transpose()?;
        // Leaves of members that have not written for long may be past their lifetime; that is no reason to stay outside.
        let builder = JoinBuilder::new(&self.provider, processed).with_ratchet_tree(read_tree(tree)?).skip_lifetime_validation();
        let builder = if replace { builder.replace_old_group() } else { builder };
        let staged = builder.build().map_err(Error::invalid)?;
        let id = own_id(staged.group_context().group_id())?;
        let roster = Roster::new(staged.group_context().extensions(), staged.members().map(|member| (member.index, member.credential)))?;
        roster.check()?;
        let by = roster.leaves.get(&staged.welcome_sender_index().u32()).ok_or(Denied::NotMember)?.account;
        if by != self.own.account && roster.profile.role(by) < profile::Role::Admin {
            return Err(Denied::NotAllowed.into());
        }
        if roster.leaf_of(self.own) != Some(staged.own_leaf_index().u32()) {
            return Err(Denied::Credential.into());
        }
        let mls = staged.into_group(&self.provider).map_err(Error::invalid)?;
        if let Some(key) = key {
            self.tx.put(StateKey::GroupNameKey(id), key.as_bytes().to_vec());
        }
        Ok(Group::new(id, mls))
    }

    /// Joins again a group that this device has a leaf in but whose state it lost: an external commit. Needs the GroupInfo (an MLSMessage)
    /// and the tree of the current epoch. The group is at the new epoch at once: commit the transaction only when the server has
    /// accepted, and drop it otherwise.
    pub fn rejoin(&self, info: &[u8], tree: &[u8]) -> Result<(Group, Outgoing), Error> {
        let MlsMessageBodyIn::GroupInfo(info) = message(info)? else { return Err(Error::invalid("not a GroupInfo")) };
        let (id, suite) = (own_id(info.group_id())?, info.ciphersuite());
        let signer = self.signer(suite)?;
        let leaf = LeafNodeParameters::builder().with_capabilities(key_package::capabilities()).build();
        let builder = ExternalCommitBuilder::new().with_ratchet_tree(read_tree(tree)?).with_config(config()).skip_lifetime_validation();
        let (mls, bundle) = builder
            .build_group(&self.provider, info, signer.credential(self.own))
            .map_err(Error::invalid)?
            .leaf_node_parameters(leaf)
            .load_psks(&self.provider.storage)
            .map_err(Error::invalid)?
            .create_group_info(true)
            .build(&self.provider.crypto, &self.provider.crypto, &signer, |_| true)
            .map_err(Error::invalid)?
            .finalize(&self.provider)
            .map_err(Error::invalid)?;
        let group = Group::new(id, mls);
        let roster = group.roster()?;
        roster.check()?;
        if roster.leaf_of(self.own) != Some(group.mls.own_leaf_index().u32()) {
            return Err(Denied::Credential.into());
        }
        let outgoing = outgoing(bundle, group.epoch(), &signer)?;
        Ok((group, outgoing))
    }

    /// The key of a group's name, if this device has it: what another device of the group may be told, encrypted.
    pub fn name_key(&self, id: GroupId) -> Result<Option<NameKey>, Error> {
        let stored = self.tx.get(&StateKey::GroupNameKey(id))?;
        Ok(stored.map(|bytes| NameKey::from_slice(&bytes)).transpose()?)
    }

    /// Remembers the key of a group's name that a member told this device, if it opens the name.
    pub fn learn_name_key(&self, group: &Group, key: &NameKey) -> Result<(), Error> {
        profile::open_name(&group.roster()?.profile.sealed_name, key, group.id(), self.random)?;
        self.tx.put(StateKey::GroupNameKey(group.id()), key.as_bytes().to_vec());
        Ok(())
    }
}

/// What to send of a commit. The GroupInfo that leaves the device has no name key.
pub(super) fn outgoing(bundle: openmls::prelude::CommitMessageBundle, epoch: u64, signer: &Signer<'_>) -> Result<Outgoing, Error> {
    let (commit, welcome, info) = bundle.into_messages();
    let bytes = |message: openmls::prelude::MlsMessageOut| message.tls_serialize_detached().map_err(Error::invalid);
    let info = bytes(info.ok_or_else(|| Error::invalid("a commit without GroupInfo"))?)?;
    let commit = bytes(commit)?;
    if commit.len() > limits::COMMIT_BYTES {
        return Err(Denied::Full.into());
    }
    let group_info = group_info::without(NAME_KEY, &info, signer)?;
    Ok(Outgoing { epoch, commit, welcome: welcome.map(bytes).transpose()?, group_info })
}

pub(super) fn message(bytes: &[u8]) -> Result<MlsMessageBodyIn, Error> {
    Ok(MlsMessageIn::tls_deserialize_exact(bytes).map_err(Error::invalid)?.extract())
}

fn read_tree(bytes: &[u8]) -> Result<RatchetTreeIn, Error> {
    RatchetTreeIn::tls_deserialize_exact(bytes).map_err(Error::invalid)
}

fn mls_id(id: GroupId) -> MlsGroupId {
    MlsGroupId::from_slice(id.as_bytes())
}

fn own_id(id: &MlsGroupId) -> Result<GroupId, Error> {
    GroupId::from_slice(id.as_slice()).map_err(Error::invalid)
}

fn lifetime(now: UnixMillis) -> Lifetime {
    let now = now.0 / 1000;
    Lifetime::init(now.saturating_sub(limits::KEY_PACKAGE_SKEW_S), now + limits::KEY_PACKAGE_LIFETIME_S)
}

fn ratchets() -> SenderRatchetConfiguration {
    SenderRatchetConfiguration::new(limits::GROUP_OUT_OF_ORDER, limits::GROUP_FORWARD)
}

/// Commits and proposals are public to the server, which checks them; messages never are.
fn config() -> MlsGroupJoinConfig {
    MlsGroupJoinConfig::builder()
        .wire_format_policy(PURE_PLAINTEXT_WIRE_FORMAT_POLICY)
        .use_ratchet_tree_extension(false)
        .max_past_epochs(limits::PAST_EPOCHS)
        .sender_ratchet_configuration(ratchets())
        .build()
}
