//! `--crypto`: the same traffic, but each content is a real libsignal message, encrypted and decrypted in this process.

use std::time::SystemTime;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt as _;
use libsignal_protocol::{
    CiphertextMessage, DeviceId, IdentityKey, InMemSignalProtocolStore, PreKeyBundle, PreKeySignalMessage, ProtocolAddress, PublicKey,
    SignalMessage, kem, message_decrypt, message_encrypt, process_prekey_bundle,
};
use serde_json::Value;

use super::api::{Api, Registered};
use super::audit::Routes;
use super::keys::Keyset;

/// The stores never wait: they are in memory.
const READY: &str = "a store in memory is always ready";

struct Party {
    store: InMemSignalProtocolStore,
    address: ProtocolAddress,
}

impl Party {
    async fn new(device: &Registered, keys: &Keyset) -> anyhow::Result<Self> {
        Ok(Self { store: keys.store().await?, address: address(&device.target.account, device.target.device)? })
    }
}

/// Both ends of every conversation of a run.
pub struct Parties {
    senders: Vec<Party>,
    recipients: Vec<Party>,
}

fn address(account: &[u8], device: u32) -> anyhow::Result<ProtocolAddress> {
    let account = crate::ids::AccountId::from_slice(account)?;
    let device = DeviceId::new(u8::try_from(device)?).map_err(|_| anyhow::anyhow!("a device id out of range"))?;
    Ok(ProtocolAddress::new(account.to_string(), device))
}

impl Parties {
    /// Fetches a bundle for each pair that will talk and opens its session.
    pub async fn connect(
        api: &Api,
        senders: &[Registered],
        recipients: &[Registered],
        keys: &Keyset,
        routes: Routes,
    ) -> anyhow::Result<Self> {
        let mut parties = Self { senders: Vec::new(), recipients: Vec::new() };
        for device in recipients {
            parties.recipients.push(Party::new(device, keys).await?);
        }
        for (index, device) in senders.iter().enumerate() {
            let mut party = Party::new(device, keys).await?;
            for number in 1..=routes.peers {
                let peer = routes.recipient(index as u64, number) as usize;
                let bundle = bundle(&api.bundle(device, &recipients[peer]).await?)?;
                let to = &parties.recipients[peer].address;
                let store = &mut party.store;
                process_prekey_bundle(
                    to,
                    &mut store.session_store,
                    &mut store.identity_store,
                    &bundle,
                    SystemTime::now(),
                    &mut rand::rng(),
                )
                .await?;
            }
            parties.senders.push(party);
        }
        Ok(parties)
    }

    /// A message of a sender for a recipient: its type and bytes.
    pub fn encrypt(&mut self, sender: usize, recipient: usize, plaintext: &[u8]) -> anyhow::Result<(u8, Vec<u8>)> {
        let to = self.recipients[recipient].address.clone();
        let store = &mut self.senders[sender].store;
        let message =
            message_encrypt(plaintext, &to, &mut store.session_store, &mut store.identity_store, SystemTime::now(), &mut rand::rng())
                .now_or_never()
                .context(READY)??;
        Ok((message.message_type() as u8, message.serialize().to_vec()))
    }

    /// What a recipient was sent.
    pub fn decrypt(
        &mut self,
        recipient: usize,
        sender_account: &[u8],
        sender_device: u32,
        kind: u8,
        content: &[u8],
    ) -> anyhow::Result<Vec<u8>> {
        let from = address(sender_account, sender_device)?;
        let message = match kind {
            2 => CiphertextMessage::SignalMessage(SignalMessage::try_from(content)?),
            3 => CiphertextMessage::PreKeySignalMessage(PreKeySignalMessage::try_from(content)?),
            other => anyhow::bail!("an envelope of type {other}"),
        };
        let store = &mut self.recipients[recipient].store;
        let plaintext = message_decrypt(
            &message,
            &from,
            &mut store.session_store,
            &mut store.identity_store,
            &mut store.pre_key_store,
            &store.signed_pre_key_store,
            &mut store.kyber_pre_key_store,
            &mut rand::rng(),
        )
        .now_or_never()
        .context(READY)??;
        Ok(plaintext)
    }
}

fn bundle(answer: &Value) -> anyhow::Result<PreKeyBundle> {
    let device = &answer["devices"][0];
    let bytes = |value: &Value| STANDARD.decode(value.as_str().unwrap_or_default()).context("a bundle's field is not base64");
    let number = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok()).context("a bundle's field is not a number");
    let one_time = match &device["one_time_prekey"] {
        Value::Null => None,
        key => Some((number(&key["id"])?.into(), PublicKey::deserialize(&bytes(&key["public_key"])?)?)),
    };
    let (signed, pq) = (&device["signed_prekey"], &device["pq_prekey"]);
    Ok(PreKeyBundle::new(
        number(&device["registration_id"])?,
        DeviceId::new(u8::try_from(number(&device["device_id"])?)?).map_err(|_| anyhow::anyhow!("a device id out of range"))?,
        one_time,
        number(&signed["id"])?.into(),
        PublicKey::deserialize(&bytes(&signed["public_key"])?)?,
        bytes(&signed["signature"])?,
        number(&pq["id"])?.into(),
        kem::PublicKey::deserialize(&bytes(&pq["public_key"])?)?,
        bytes(&pq["signature"])?,
        IdentityKey::decode(&bytes(&device["identity_key"])?)?,
    )?)
}
