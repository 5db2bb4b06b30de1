//! MLS of the devices of a run: the SDK's own engine over openmls, in memory.

use anyhow::Context as _;

use crate::client::core::groups::{Change, Created, Engine, Error, Group, Outgoing, Received};
use crate::client::core::state::{MemoryState, StateKey, StateTx, encode_address};
use crate::clock::{Clock as _, SystemClock, SystemRandom};
use crate::ids::{DeviceAddr, GroupId};

/// A device with its keys. Its group stays open and is never saved: the tool ends with it, and writing down a group of 1,500 takes longer
/// than what is written about.
pub struct Member {
    state: MemoryState,
    group: Option<Group>,
}

impl Member {
    pub fn new(address: DeviceAddr) -> Self {
        let mut state = MemoryState::default();
        state.commit([(StateKey::OwnAddress, Some(encode_address(address).into()))].into());
        Self { state, group: None }
    }

    fn run<T>(&mut self, work: impl FnOnce(&Engine<'_, '_>, &mut Option<Group>) -> Result<T, Error>) -> Result<T, Error> {
        let tx = StateTx::new(&self.state);
        let done = Engine::new(&tx, &SystemRandom).and_then(|engine| work(&engine.unsaved(), &mut self.group));
        let (writes, _) = tx.finish();
        if done.is_ok() {
            self.state.commit(writes);
        }
        done
    }

    fn in_group<T>(&mut self, work: impl FnOnce(&Engine<'_, '_>, &mut Group) -> Result<T, Error>) -> Result<T, Error> {
        self.run(|engine, group| work(engine, group.as_mut().ok_or(Error::NotMember)?))
    }

    pub fn key_package(&mut self) -> anyhow::Result<Vec<u8>> {
        let made = self.run(|engine, _| engine.key_packages(1, SystemClock.now()))?;
        made.into_iter().next().context("no KeyPackage was made")
    }

    pub fn create(&mut self, id: GroupId) -> anyhow::Result<Created> {
        Ok(self.run(|engine, open| {
            let (group, created) = engine.create(id, "load", None, SystemClock.now())?;
            *open = Some(group);
            Ok(created)
        })?)
    }

    /// Adds and removes these, or renews the own keys if there are none.
    pub fn change(&mut self, add: &[(DeviceAddr, Vec<u8>)], remove: &[DeviceAddr]) -> anyhow::Result<Outgoing> {
        let add = add.iter().map(|(device, bytes)| (*device, bytes.as_slice())).collect();
        let change = Change { add, remove_devices: remove.to_vec(), ..Change::default() };
        Ok(self.in_group(|engine, group| group.change(engine, &change, SystemClock.now()))?)
    }

    pub fn accepted(&mut self) -> anyhow::Result<()> {
        self.in_group(|engine, group| group.accepted(engine))?;
        Ok(())
    }

    pub fn refused(&mut self) -> anyhow::Result<()> {
        Ok(self.in_group(|engine, group| group.refused(engine))?)
    }

    pub fn join(&mut self, welcome: &[u8], tree: &[u8]) -> Result<(), Error> {
        self.run(|engine, open| {
            *open = Some(engine.join(welcome, tree, true)?);
            Ok(())
        })
    }

    /// Takes in a commit or a message; the plaintext of a message.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.in_group(|engine, group| match group.receive(engine, bytes)? {
            Received::Message { content, .. } => Ok(Some(content.to_vec())),
            _ => Ok(None),
        })
    }

    pub fn encrypt(&mut self, content: &[u8]) -> anyhow::Result<Vec<u8>> {
        Ok(self.in_group(|engine, group| group.encrypt(engine, content))?)
    }

    /// `None` outside of a group, or once it was taken out.
    pub fn epoch(&self) -> Option<u64> {
        self.group.as_ref().filter(|group| group.is_active()).map(Group::epoch)
    }

    /// The epoch, and what all of it have in common; `None` outside of a group.
    pub fn view(&self) -> Option<(u64, Vec<u8>)> {
        self.group.as_ref().filter(|group| group.is_active()).map(|group| (group.epoch(), group.authenticator()))
    }
}

/// Bytes in the form of a PrivateMessage, which nobody decrypts: what comes before the content, of which the rest is anything.
pub fn opaque_head(group: GroupId, epoch: u64, content: usize) -> Vec<u8> {
    // MLSMessage: version 1, wire format 2; then group id, epoch, content type (application), authenticated data, sender data, ciphertext.
    let mut head = vec![0, 1, 0, 2, 16];
    head.extend_from_slice(group.as_bytes());
    head.extend_from_slice(&epoch.to_be_bytes());
    head.extend_from_slice(&[1, 0, 28]);
    head.extend_from_slice(&[0x5e; 28]);
    // A length of RFC 9420: its first two bits say how long it is.
    match content {
        0..64 => head.push(content as u8),
        64..16_384 => head.extend_from_slice(&(0x4000 | content as u16).to_be_bytes()),
        _ => head.extend_from_slice(&(0x8000_0000 | content as u32).to_be_bytes()),
    }
    head
}

#[cfg(test)]
mod tests {
    use openmls::prelude::tls_codec::Deserialize as _;
    use openmls::prelude::{MlsMessageBodyIn, MlsMessageIn, ProtocolMessage};

    use super::*;

    #[test]
    fn opaque_messages_look_like_private_messages() {
        let group = GroupId::from_bytes([7; 16]);
        for length in [16, 63, 64, 200, 16_383, 16_384, 100_000] {
            let bytes = [opaque_head(group, 5, length), vec![1; length]].concat();
            let message = MlsMessageIn::tls_deserialize_exact(&bytes).expect("an MLSMessage");
            let MlsMessageBodyIn::PrivateMessage(message) = message.extract() else { panic!("not a PrivateMessage") };
            let message: ProtocolMessage = message.into();
            assert_eq!((message.group_id().as_slice(), message.epoch().as_u64()), (group.as_bytes().as_slice(), 5));
        }
    }
}
