//! What openmls keeps of groups, as bytes by key. A member's is in its [`StateTx`](crate::client::core::state::StateTx), written by the
//! transaction that it belongs to, together with cursor and messages, or not at all; a server's is only the public part.
//! Values are CBOR: it names its fields, so that a later openmls can add some.

use openmls_traits::storage::{CURRENT_VERSION, Entity, Key, StorageProvider, traits};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::{Zeroize as _, Zeroizing};

/// What openmls keeps. The numbers stand in databases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "they are named as in openmls")]
pub enum Kind {
    JoinConfig = 1,
    OwnLeafNodes = 2,
    ProposalRefs = 3,
    Proposal = 4,
    Tree = 5,
    InterimTranscriptHash = 6,
    GroupContext = 7,
    ConfirmationTag = 8,
    GroupState = 9,
    MessageSecrets = 10,
    ResumptionPskStore = 11,
    OwnLeafIndex = 12,
    GroupEpochSecrets = 13,
    SignatureKeyPair = 14,
    EncryptionKeyPair = 15,
    EncryptionEpochKeyPairs = 16,
    KeyPackage = 17,
    Psk = 18,
}

/// Where the bytes are. Changes are seen by the reads behind them.
pub trait Backend {
    /// The value at a key.
    fn get(&self, kind: Kind, key: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, Error>;
    /// Sets a value.
    fn put(&self, kind: Kind, key: Vec<u8>, value: Zeroizing<Vec<u8>>);
    /// Removes a key.
    fn delete(&self, kind: Kind, key: Vec<u8>);
    /// Whether what is set of this kind is kept at all: what is not, is not even encoded.
    fn keeps(&self, _kind: Kind) -> bool {
        true
    }
}

/// What is stored can't be read, or is not what was written.
#[derive(Debug, Clone, thiserror::Error)]
#[error("stored MLS state: {0}")]
pub struct Error(pub String);

const V: u16 = CURRENT_VERSION;

/// Storage of openmls over a backend.
#[derive(Debug, Default)]
pub struct Storage<B>(pub B);

type Done<T = ()> = Result<T, Error>;

fn damaged(error: impl std::fmt::Display) -> Error {
    Error(error.to_string())
}

/// Bytes in the making. What they leave behind when they grow is wiped, since they may be secret.
#[derive(Default)]
struct SecretBytes(Zeroizing<Vec<u8>>);

impl std::io::Write for SecretBytes {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let needed = self.0.len() + bytes.len();
        if needed > self.0.capacity() {
            let mut larger = Zeroizing::new(Vec::with_capacity(needed.max(self.0.capacity() * 2).max(256)));
            larger.extend_from_slice(&self.0);
            self.0.zeroize();
            self.0 = larger;
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn encode(value: &impl Serialize) -> Done<Zeroizing<Vec<u8>>> {
    let mut bytes = SecretBytes::default();
    ciborium::into_writer(value, &mut bytes).map_err(damaged)?;
    Ok(bytes.0)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Done<T> {
    ciborium::from_reader(bytes).map_err(damaged)
}

impl<B: Backend> Storage<B> {
    fn key(&self, keys: &[&dyn ErasedKey]) -> Done<Vec<u8>> {
        let mut key = Vec::new();
        for part in keys {
            key.extend_from_slice(&part.encoded()?);
        }
        Ok(key)
    }

    fn put(&self, kind: Kind, keys: &[&dyn ErasedKey], value: &impl Serialize) -> Done {
        if !self.0.keeps(kind) {
            return Ok(());
        }
        self.0.put(kind, self.key(keys)?, encode(value)?);
        Ok(())
    }

    fn read<T: DeserializeOwned>(&self, kind: Kind, keys: &[&dyn ErasedKey]) -> Done<Option<T>> {
        self.0.get(kind, &self.key(keys)?)?.map(|bytes| decode(&bytes)).transpose()
    }

    fn list<T: DeserializeOwned>(&self, kind: Kind, keys: &[&dyn ErasedKey]) -> Done<Vec<T>> {
        Ok(self.read(kind, keys)?.unwrap_or_default())
    }

    fn remove(&self, kind: Kind, keys: &[&dyn ErasedKey]) -> Done {
        self.0.delete(kind, self.key(keys)?);
        Ok(())
    }

    /// Proposal references are kept as their encodings, so that they need no type to be compared.
    fn refs(&self, group: &dyn ErasedKey) -> Done<Vec<Vec<u8>>> {
        self.list(Kind::ProposalRefs, &[group])
    }
}

/// A key of any of openmls's types.
trait ErasedKey {
    fn encoded(&self) -> Done<Zeroizing<Vec<u8>>>;
}

impl<T: Key<V>> ErasedKey for T {
    fn encoded(&self) -> Done<Zeroizing<Vec<u8>>> {
        encode(self)
    }
}

/// A number as a part of a key.
struct Index(u32);

impl ErasedKey for Index {
    fn encoded(&self) -> Done<Zeroizing<Vec<u8>>> {
        encode(&self.0)
    }
}

fn owned<T: Entity<V>>(value: Option<T>) -> Done<Option<T>> {
    Ok(value)
}

/// One value for each key: how it is written, read and removed.
macro_rules! values {
    ($($kind:ident: $key:ident / $value:ident => $write:ident $read:ident $remove:ident;)*) => {
        $(
            fn $write<K: traits::$key<V>, E: traits::$value<V>>(&self, key: &K, value: &E) -> Done {
                self.put(Kind::$kind, &[key], value)
            }
            values!(@read $kind $key $value $read);
            fn $remove<K: traits::$key<V>>(&self, key: &K) -> Done {
                self.remove(Kind::$kind, &[key])
            }
        )*
    };
    (@read $kind:ident $key:ident $value:ident $read:ident) => {
        fn $read<K: traits::$key<V>, E: traits::$value<V>>(&self, key: &K) -> Done<Option<E>> {
            owned(self.read(Kind::$kind, &[key])?)
        }
    };
}

impl<B: Backend> StorageProvider<V> for Storage<B> {
    type Error = Error;

    values! {
        JoinConfig: GroupId / MlsGroupJoinConfig => write_mls_join_config mls_group_join_config delete_group_config;
        Tree: GroupId / TreeSync => write_tree tree delete_tree;
        InterimTranscriptHash: GroupId / InterimTranscriptHash => write_interim_transcript_hash interim_transcript_hash delete_interim_transcript_hash;
        GroupContext: GroupId / GroupContext => write_context group_context delete_context;
        ConfirmationTag: GroupId / ConfirmationTag => write_confirmation_tag confirmation_tag delete_confirmation_tag;
        MessageSecrets: GroupId / MessageSecrets => write_message_secrets message_secrets delete_message_secrets;
        ResumptionPskStore: GroupId / ResumptionPskStore => write_resumption_psk_store resumption_psk_store delete_all_resumption_psk_secrets;
        OwnLeafIndex: GroupId / LeafNodeIndex => write_own_leaf_index own_leaf_index delete_own_leaf_index;
        GroupEpochSecrets: GroupId / GroupEpochSecrets => write_group_epoch_secrets group_epoch_secrets delete_group_epoch_secrets;
        SignatureKeyPair: SignaturePublicKey / SignatureKeyPair => write_signature_key_pair signature_key_pair delete_signature_key_pair;
        KeyPackage: HashReference / KeyPackage => write_key_package key_package delete_key_package;
    }

    fn write_group_state<E: traits::GroupState<V>, K: traits::GroupId<V>>(&self, key: &K, value: &E) -> Done {
        self.put(Kind::GroupState, &[key], value)
    }

    fn group_state<E: traits::GroupState<V>, K: traits::GroupId<V>>(&self, key: &K) -> Done<Option<E>> {
        self.read(Kind::GroupState, &[key])
    }

    fn delete_group_state<K: traits::GroupId<V>>(&self, key: &K) -> Done {
        self.remove(Kind::GroupState, &[key])
    }

    fn write_encryption_key_pair<K: traits::EncryptionKey<V>, E: traits::HpkeKeyPair<V>>(&self, key: &K, value: &E) -> Done {
        self.put(Kind::EncryptionKeyPair, &[key], value)
    }

    fn encryption_key_pair<E: traits::HpkeKeyPair<V>, K: traits::EncryptionKey<V>>(&self, key: &K) -> Done<Option<E>> {
        self.read(Kind::EncryptionKeyPair, &[key])
    }

    fn delete_encryption_key_pair<K: traits::EncryptionKey<V>>(&self, key: &K) -> Done {
        self.remove(Kind::EncryptionKeyPair, &[key])
    }

    fn write_psk<K: traits::PskId<V>, E: traits::PskBundle<V>>(&self, key: &K, value: &E) -> Done {
        self.put(Kind::Psk, &[key], value)
    }

    fn psk<E: traits::PskBundle<V>, K: traits::PskId<V>>(&self, key: &K) -> Done<Option<E>> {
        self.read(Kind::Psk, &[key])
    }

    fn delete_psk<K: traits::PskId<V>>(&self, key: &K) -> Done {
        self.remove(Kind::Psk, &[key])
    }

    fn append_own_leaf_node<K: traits::GroupId<V>, E: traits::LeafNode<V>>(&self, key: &K, value: &E) -> Done {
        let mut all: Vec<ciborium::Value> = self.list(Kind::OwnLeafNodes, &[key])?;
        all.push(ciborium::Value::serialized(value).map_err(damaged)?);
        self.put(Kind::OwnLeafNodes, &[key], &all)
    }

    fn own_leaf_nodes<K: traits::GroupId<V>, E: traits::LeafNode<V>>(&self, key: &K) -> Done<Vec<E>> {
        self.list(Kind::OwnLeafNodes, &[key])
    }

    fn delete_own_leaf_nodes<K: traits::GroupId<V>>(&self, key: &K) -> Done {
        self.remove(Kind::OwnLeafNodes, &[key])
    }

    fn queue_proposal<K: traits::GroupId<V>, R: traits::ProposalRef<V>, E: traits::QueuedProposal<V>>(
        &self,
        group: &K,
        reference: &R,
        proposal: &E,
    ) -> Done {
        let (mut refs, new) = (self.refs(group)?, encode(reference)?.to_vec());
        if !refs.contains(&new) {
            refs.push(new);
            self.put(Kind::ProposalRefs, &[group], &refs)?;
        }
        self.put(Kind::Proposal, &[group, reference], proposal)
    }

    fn queued_proposal_refs<K: traits::GroupId<V>, R: traits::ProposalRef<V>>(&self, group: &K) -> Done<Vec<R>> {
        self.refs(group)?.iter().map(|bytes| decode(bytes)).collect()
    }

    fn queued_proposals<K: traits::GroupId<V>, R: traits::ProposalRef<V>, E: traits::QueuedProposal<V>>(
        &self,
        group: &K,
    ) -> Done<Vec<(R, E)>> {
        let mut all = Vec::new();
        for bytes in self.refs(group)? {
            let reference: R = decode(&bytes)?;
            if let Some(proposal) = self.read(Kind::Proposal, &[group, &reference])? {
                all.push((reference, proposal));
            }
        }
        Ok(all)
    }

    fn remove_proposal<K: traits::GroupId<V>, R: traits::ProposalRef<V>>(&self, group: &K, reference: &R) -> Done {
        let (mut refs, gone) = (self.refs(group)?, encode(reference)?.to_vec());
        refs.retain(|one| *one != gone);
        self.put(Kind::ProposalRefs, &[group], &refs)?;
        self.remove(Kind::Proposal, &[group, reference])
    }

    fn clear_proposal_queue<K: traits::GroupId<V>, R: traits::ProposalRef<V>>(&self, group: &K) -> Done {
        for reference in self.queued_proposal_refs::<K, R>(group)? {
            self.remove(Kind::Proposal, &[group, &reference])?;
        }
        self.remove(Kind::ProposalRefs, &[group])
    }

    fn write_encryption_epoch_key_pairs<K: traits::GroupId<V>, P: traits::EpochKey<V>, E: traits::HpkeKeyPair<V>>(
        &self,
        group: &K,
        epoch: &P,
        leaf_index: u32,
        pairs: &[E],
    ) -> Done {
        self.put(Kind::EncryptionEpochKeyPairs, &[group, epoch, &Index(leaf_index)], &pairs)
    }

    fn encryption_epoch_key_pairs<K: traits::GroupId<V>, P: traits::EpochKey<V>, E: traits::HpkeKeyPair<V>>(
        &self,
        group: &K,
        epoch: &P,
        leaf_index: u32,
    ) -> Done<Vec<E>> {
        self.list(Kind::EncryptionEpochKeyPairs, &[group, epoch, &Index(leaf_index)])
    }

    fn delete_encryption_epoch_key_pairs<K: traits::GroupId<V>, P: traits::EpochKey<V>>(
        &self,
        group: &K,
        epoch: &P,
        leaf_index: u32,
    ) -> Done {
        self.remove(Kind::EncryptionEpochKeyPairs, &[group, epoch, &Index(leaf_index)])
    }
}
