//! Real libsignal keys for the devices that the load tool registers. Opaque devices never decrypt, so all of them
//! publish one set, made once: 20,000 registrations then cost the server's work, not ours.

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use libsignal_protocol::{
    GenericSignedPreKey, IdentityKeyPair, InMemSignalProtocolStore, KeyPair, KyberPreKeyRecord, KyberPreKeyStore as _, SignedPreKeyRecord,
    SignedPreKeyStore as _, Timestamp, kem,
};
use serde_json::{Value, json};

/// The registration id of every device of the load tool.
pub const REGISTRATION_ID: u32 = 4_242;

/// What a device publishes, and the private halves for those that decrypt.
pub struct Keyset {
    identity: IdentityKeyPair,
    signed: SignedPreKeyRecord,
    last_resort: KyberPreKeyRecord,
}

impl Keyset {
    /// A new one.
    pub fn generate() -> anyhow::Result<Self> {
        let mut rng = rand::rng();
        let identity = IdentityKeyPair::generate(&mut rng);
        let signed = KeyPair::generate(&mut rng);
        let signature = identity.private_key().calculate_signature(&signed.public_key.serialize(), &mut rng)?;
        let now = Timestamp::from_epoch_millis(crate::clock::Clock::now(&crate::clock::SystemClock).0);
        let signed = SignedPreKeyRecord::new(1.into(), now, &signed, &signature);
        let last_resort = KyberPreKeyRecord::generate(kem::KeyType::Kyber1024, 1.into(), identity.private_key())?;
        Ok(Self { identity, signed, last_resort })
    }

    /// The body of `POST /v1/devices` without its tokens.
    pub fn registration(&self, one_time: usize) -> anyhow::Result<Value> {
        let mut body = json!({
            "name": "load",
            "registration_id": REGISTRATION_ID,
            "identity_key": STANDARD.encode(self.identity.identity_key().serialize()),
            "signed_prekey": signed_json(&self.signed)?,
            "pq_last_resort_prekey": signed_json(&self.last_resort)?,
        });
        let keys = self.one_time(1, one_time)?;
        for field in ["one_time_prekeys", "pq_one_time_prekeys"] {
            body[field] = keys[field].clone();
        }
        Ok(body)
    }

    /// The body of `PUT /v1/keys` with this many one-time prekeys of each kind, their ids from `first`.
    /// The key is the same under each id: the server's work is, and nobody decrypts.
    pub fn one_time(&self, first: u32, count: usize) -> anyhow::Result<Value> {
        let mut rng = rand::rng();
        let ec = STANDARD.encode(KeyPair::generate(&mut rng).public_key.serialize());
        let pq = kem::KeyPair::generate(kem::KeyType::Kyber1024, &mut rng).public_key.serialize();
        let signature = STANDARD.encode(self.identity.private_key().calculate_signature(&pq, &mut rng)?);
        let pq = STANDARD.encode(pq);
        let ids = first..first + u32::try_from(count).context("a batch of prekeys has at most 100")?;
        Ok(json!({
            "one_time_prekeys": ids.clone().map(|id| json!({"id": id, "public_key": ec})).collect::<Vec<_>>(),
            "pq_one_time_prekeys": ids.map(|id| json!({"id": id, "public_key": pq, "signature": signature})).collect::<Vec<_>>(),
        }))
    }

    /// A store that can decrypt what is sent to this keyset, and send.
    pub async fn store(&self) -> anyhow::Result<InMemSignalProtocolStore> {
        let mut store = InMemSignalProtocolStore::new(self.identity, REGISTRATION_ID)?;
        store.save_signed_pre_key(1.into(), &self.signed).await?;
        store.save_kyber_pre_key(1.into(), &self.last_resort).await?;
        Ok(store)
    }
}

fn signed_json<K>(key: &K) -> anyhow::Result<Value>
where
    K: GenericSignedPreKey,
    K::KeyPair: PublicOf,
    u32: From<K::Id>,
{
    Ok(json!({
        "id": u32::from(key.id()?),
        "public_key": STANDARD.encode(key.key_pair()?.public()),
        "signature": STANDARD.encode(key.signature()?),
    }))
}

/// The serialized public half of either kind of pair.
trait PublicOf {
    fn public(&self) -> Box<[u8]>;
}

impl PublicOf for KeyPair {
    fn public(&self) -> Box<[u8]> {
        self.public_key.serialize()
    }
}

impl PublicOf for kem::KeyPair {
    fn public(&self) -> Box<[u8]> {
        self.public_key.serialize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_verify_as_the_api_says() {
        let keys = Keyset::generate().unwrap();
        let body = keys.registration(3).unwrap();
        let bytes = |value: &Value| STANDARD.decode(value.as_str().unwrap()).unwrap();
        let identity = libsignal_protocol::IdentityKey::decode(&bytes(&body["identity_key"])).unwrap();
        let sized = |value: &Value, len: usize| {
            let key = bytes(&value["public_key"]);
            assert_eq!(key.len(), len);
            assert!(identity.public_key().verify_signature(&key, &bytes(&value["signature"])));
        };
        sized(&body["signed_prekey"], 33);
        sized(&body["pq_last_resort_prekey"], 1_569);
        sized(&body["pq_one_time_prekeys"][2], 1_569);
        assert_eq!((bytes(&body["one_time_prekeys"][0]["public_key"]).len(), &body["one_time_prekeys"][2]["id"]), (33, &json!(3)));
    }
}
