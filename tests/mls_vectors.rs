//! The cryptography under MLS against what others computed: the vectors of RFC 9180 (appendix A), and vectors in the format of RFC 9420's working
//! group. `tests/fixtures/mls` holds such vectors made by another implementation (`tests/interop/vectors.mjs`); the group's own files
//! (`crypto-basics.json` and `key-schedule.json`) are read from the folder that SEALPOST_MLS_VECTORS names.

use std::path::Path;
use std::sync::Mutex;

use openmls_traits::crypto::OpenMlsCrypto as _;
use openmls_traits::types::{Ciphersuite, CryptoError, HashType, HpkeCiphertext};
use sealpost::clock::{Random, SystemRandom};
use sealpost::mls::crypto::{Crypto, SUITES};
use serde_json::Value;

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
}

fn bytes(value: &Value) -> Vec<u8> {
    unhex(value.as_str().expect("a text"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An `opaque<V>` of RFC 9420.
fn vector(bytes: &[u8]) -> Vec<u8> {
    let length = match bytes.len() {
        length @ 0..64 => vec![length as u8],
        length => (length as u16 | 0x4000).to_be_bytes().to_vec(),
    };
    [length, bytes.to_vec()].concat()
}

fn labelled(label: &str) -> Vec<u8> {
    vector(&[b"MLS 1.0 ", label.as_bytes()].concat())
}

fn suite_of(vectors: &Value) -> Option<Ciphersuite> {
    SUITES.into_iter().find(|suite| u16::from(*suite) == vectors["cipher_suite"])
}

fn expand_with_label(secret: &[u8], label: &str, context: &[u8], length: usize) -> Vec<u8> {
    let info = [&(length as u16).to_be_bytes()[..], &labelled(label), &vector(context)].concat();
    Crypto::new(&SystemRandom).hkdf_expand(HashType::Sha2_256, secret, &info, length).expect("expands").as_slice().to_vec()
}

fn derive_secret(secret: &[u8], label: &str) -> Vec<u8> {
    expand_with_label(secret, label, &[], 32)
}

fn extract(salt: &[u8], ikm: &[u8]) -> Vec<u8> {
    Crypto::new(&SystemRandom).hkdf_extract(HashType::Sha2_256, salt, ikm).expect("extracts").as_slice().to_vec()
}

/// Calls `check` with the vectors of each suite that is offered here: those in the repository, and the working group's where they are.
fn each_suite(file: &str, check: impl Fn(Ciphersuite, &Value)) {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mls")];
    match std::env::var_os("SEALPOST_MLS_VECTORS") {
        Some(folder) => folders.push(folder.into()),
        None => println!("skipped: the working group's own {file}, since SEALPOST_MLS_VECTORS names no folder with it"),
    }
    for folder in folders {
        let text = std::fs::read_to_string(folder.join(file)).expect("the file is readable");
        let vectors: Vec<Value> = serde_json::from_str(&text).expect("JSON");
        let checked =
            vectors.iter().filter_map(|vectors| Some((suite_of(vectors)?, vectors))).map(|(suite, one)| check(suite, one)).count();
        assert!(checked >= 1, "{file} holds none of our suites");
        println!("{}: {checked} suites", folder.join(file).display());
    }
}

#[test]
fn crypto_basics() {
    let crypto = Crypto::new(&SystemRandom);
    each_suite("crypto-basics.json", |suite, vectors| {
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let case = &vectors["ref_hash"];
        let input = [vector(text(&case["label"]).as_bytes()), vector(&bytes(&case["value"]))].concat();
        assert_eq!(crypto.hash(suite.hash_algorithm(), &input).expect("hashes"), bytes(&case["out"]));

        let case = &vectors["expand_with_label"];
        let length = case["length"].as_u64().expect("a length") as usize;
        let out = expand_with_label(&bytes(&case["secret"]), &text(&case["label"]), &bytes(&case["context"]), length);
        assert_eq!(out, bytes(&case["out"]));
        let case = &vectors["derive_secret"];
        assert_eq!(derive_secret(&bytes(&case["secret"]), &text(&case["label"])), bytes(&case["out"]));
        let case = &vectors["derive_tree_secret"];
        let generation = (case["generation"].as_u64().expect("a number") as u32).to_be_bytes();
        assert_eq!(expand_with_label(&bytes(&case["secret"]), &text(&case["label"]), &generation, 32), bytes(&case["out"]));

        let case = &vectors["sign_with_label"];
        let content = [labelled(&text(&case["label"])), vector(&bytes(&case["content"]))].concat();
        let (scheme, public) = (suite.signature_algorithm(), bytes(&case["pub"]));
        crypto.verify_signature(scheme, &content, &public, &bytes(&case["signature"])).expect("a right signature");
        let other = [content.as_slice(), &[0]].concat();
        assert!(crypto.verify_signature(scheme, &other, &public, &bytes(&case["signature"])).is_err());
        if case["priv"].is_string() {
            let signature = crypto.sign(scheme, &content, &bytes(&case["priv"])).expect("signs");
            crypto.verify_signature(scheme, &content, &public, &signature).expect("a right signature");
        }

        let case = &vectors["encrypt_with_label"];
        let info = [labelled(&text(&case["label"])), vector(&bytes(&case["context"]))].concat();
        let (private, public, plaintext) = (bytes(&case["priv"]), bytes(&case["pub"]), bytes(&case["plaintext"]));
        let sealed = HpkeCiphertext { kem_output: bytes(&case["kem_output"]).into(), ciphertext: bytes(&case["ciphertext"]).into() };
        assert_eq!(crypto.hpke_open(suite.hpke_config(), &sealed, &private, &info, &[]).expect("opens"), plaintext);
        let ours = crypto.hpke_seal(suite.hpke_config(), &public, &info, &[], &plaintext).expect("seals");
        assert_eq!(crypto.hpke_open(suite.hpke_config(), &ours, &private, &info, &[]).expect("opens"), plaintext);
    });
}

#[test]
fn key_schedule() {
    let crypto = Crypto::new(&SystemRandom);
    each_suite("key-schedule.json", |suite, vectors| {
        let mut init_secret = bytes(&vectors["initial_init_secret"]);
        for epoch in vectors["epochs"].as_array().expect("epochs") {
            let is = |name: &str, secret: &[u8]| assert_eq!(hex(secret), epoch[name].as_str().expect("a text").to_lowercase(), "{name}");
            let context = bytes(&epoch["group_context"]);
            let joiner = expand_with_label(&extract(&init_secret, &bytes(&epoch["commit_secret"])), "joiner", &context, 32);
            is("joiner_secret", &joiner);
            let member = extract(&joiner, &bytes(&epoch["psk_secret"]));
            is("welcome_secret", &derive_secret(&member, "welcome"));
            let secret = expand_with_label(&member, "epoch", &context, 32);
            for (name, label) in [
                ("init_secret", "init"),
                ("sender_data_secret", "sender data"),
                ("encryption_secret", "encryption"),
                ("exporter_secret", "exporter"),
                ("epoch_authenticator", "authentication"),
                ("external_secret", "external"),
                ("confirmation_key", "confirm"),
                ("membership_key", "membership"),
                ("resumption_psk", "resumption"),
            ] {
                is(name, &derive_secret(&secret, label));
            }
            let external = crypto.derive_hpke_keypair(suite.hpke_config(), &derive_secret(&secret, "external")).expect("derives");
            is("external_pub", &external.public);
            let case = &epoch["exporter"];
            let label = case["label"].as_str().expect("a text");
            let hashed = crypto.hash(suite.hash_algorithm(), &bytes(&case["context"])).expect("hashes");
            let exported = expand_with_label(&derive_secret(&derive_secret(&secret, "exporter"), label), "exported", &hashed, 32);
            assert_eq!(hex(&exported), case["secret"].as_str().expect("a text").to_lowercase(), "exporter");
            init_secret = derive_secret(&secret, "init");
        }
    });
}

/// Bytes that were chosen: the sender's ephemeral key.
struct Scripted(Mutex<Vec<u8>>);

impl Random for Scripted {
    fn fill(&self, buffer: &mut [u8]) {
        let mut bytes = self.0.lock().expect("not poisoned");
        let rest = bytes.split_off(buffer.len());
        buffer.copy_from_slice(&std::mem::replace(&mut *bytes, rest));
    }
}

/// RFC 9180, appendix A, base mode: one message and one exported secret.
struct Hpke {
    suite: Ciphersuite,
    ikm_e: &'static str,
    ikm_r: &'static str,
    private: &'static str,
    public: &'static str,
    enc: &'static str,
    ciphertext: &'static str,
    exported: &'static str,
}

const INFO: &str = "4f6465206f6e2061204772656369616e2055726e";
const PLAINTEXT: &str = "4265617574792069732074727574682c20747275746820626561757479";
const AAD: &str = "436f756e742d30";

const HPKE: [Hpke; 3] = [
    Hpke {
        suite: Ciphersuite::MLS_128_DHKEMX25519_AES128GCM_SHA256_Ed25519,
        ikm_e: "7268600d403fce431561aef583ee1613527cff655c1343f29812e66706df3234",
        ikm_r: "6db9df30aa07dd42ee5e8181afdb977e538f5e1fec8a06223f33f7013e525037",
        private: "4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8",
        public: "3948cfe0ad1ddb695d780e59077195da6c56506b027329794ab02bca80815c4d",
        enc: "37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431",
        ciphertext: "f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a",
        exported: "3853fe2b4035195a573ffc53856e77058e15d9ea064de3e59f4961d0095250ee",
    },
    Hpke {
        suite: Ciphersuite::MLS_128_DHKEMX25519_CHACHA20POLY1305_SHA256_Ed25519,
        ikm_e: "909a9b35d3dc4713a5e72a4da274b55d3d3821a37e5d099e74a647db583a904b",
        ikm_r: "1ac01f181fdf9f352797655161c58b75c656a6cc2716dcb66372da835542e1df",
        private: "8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb",
        public: "4310ee97d88cc1f088a5576c77ab0cf5c3ac797f3d95139c6c84b5429c59662a",
        enc: "1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a",
        ciphertext: "1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28",
        exported: "4bbd6243b8bb54cec311fac9df81841b6fd61f56538a775e7c80a9f40160606e",
    },
    Hpke {
        suite: Ciphersuite::MLS_128_DHKEMP256_AES128GCM_SHA256_P256,
        ikm_e: "4270e54ffd08d79d5928020af4686d8f6b7d35dbe470265f1f5aa22816ce860e",
        ikm_r: "668b37171f1072f3cf12ea8a236a45df23fc13b82af3609ad1e354f6ef817550",
        private: "f3ce7fdae57e1a310d87f1ebbde6f328be0a99cdbcadf4d6589cf29de4b8ffd2",
        public: "04fe8c19ce0905191ebc298a9245792531f26f0cece2460639e8bc39cb7f706a826a779b4cf969b8a0e539c7f62fb3d30ad6aa8f80e30f1d128aafd68a2ce72ea0",
        enc: "04a92719c6195d5085104f469a8b9814d5838ff72b60501e2c4466e5e67b325ac98536d7b61a1af4b78e5b7f951c0900be863c403ce65c9bfcb9382657222d18c4",
        ciphertext: "5ad590bb8baa577f8619db35a36311226a896e7342a6d836d8b7bcd2f20b6c7f9076ac232e3ab2523f39513434",
        exported: "5e9bc3d236e1911d95e65b576a8a86d478fb827e8bdfe77b741b289890490d4d",
    },
];

#[test]
fn hpke_of_rfc_9180() {
    let (info, plaintext, aad) = (unhex(INFO), unhex(PLAINTEXT), unhex(AAD));
    for case in HPKE {
        let scripted = Scripted(Mutex::new(unhex(case.ikm_e)));
        let (crypto, sender) = (Crypto::new(&SystemRandom), Crypto::new(&scripted));
        let config = || case.suite.hpke_config();
        let pair = crypto.derive_hpke_keypair(config(), &unhex(case.ikm_r)).expect("derives");
        assert_eq!(hex(&pair.public), case.public);
        let sealed = sender.hpke_seal(config(), &unhex(case.public), &info, &aad, &plaintext).expect("seals");
        assert_eq!(
            (hex(sealed.kem_output.as_slice()), hex(sealed.ciphertext.as_slice())),
            (case.enc.to_owned(), case.ciphertext.to_owned())
        );
        for private in [unhex(case.private), pair.private.to_vec()] {
            assert_eq!(crypto.hpke_open(config(), &sealed, &private, &info, &aad).expect("opens"), plaintext);
            let exported = crypto.hpke_setup_receiver_and_export(config(), &unhex(case.enc), &private, &info, &[], 32).expect("exports");
            assert_eq!(hex(&exported), case.exported);
        }
        assert_eq!(crypto.hpke_open(config(), &sealed, &unhex(case.private), &info, b"other"), Err(CryptoError::HpkeDecryptionError));
        let (enc, ours) = crypto.hpke_setup_sender_and_export(config(), &unhex(case.public), &info, &[], 32).expect("exports");
        let theirs = crypto.hpke_setup_receiver_and_export(config(), &enc, &unhex(case.private), &info, &[], 32).expect("exports");
        assert_eq!(*ours, *theirs);
    }
}

#[test]
fn what_is_not_offered_is_refused() {
    let crypto = Crypto::new(&SystemRandom);
    assert_eq!(crypto.supported_ciphersuites(), SUITES);
    let other = Ciphersuite::MLS_256_DHKEMP521_AES256GCM_SHA512_P521;
    assert!(crypto.supports(other).is_err() && crypto.derive_hpke_keypair(other.hpke_config(), &[0; 66]).is_err());
    assert!(crypto.signature_key_gen(other.signature_algorithm()).is_err());
    let suite = SUITES[0];
    let (aead, key) = (suite.aead_algorithm(), [0; 16]);
    assert!(crypto.aead_encrypt(aead, &key, b"x", &[0; 13], b"").is_err(), "a nonce that is too long");
    assert!(crypto.aead_encrypt(aead, &key[1..], b"x", &[0; 12], b"").is_err(), "a key that is too short");
    let sealed = crypto.aead_encrypt(aead, &key, b"x", &[0; 12], b"a").expect("seals");
    assert_eq!(crypto.aead_decrypt(aead, &key, &sealed, &[0; 12], b"a").expect("opens"), b"x");
    assert!(crypto.aead_decrypt(aead, &key, &sealed, &[0; 12], b"b").is_err());
    assert!(crypto.hpke_seal(suite.hpke_config(), &[0; 32], b"", b"", b"x").is_err(), "a key of low order");
}
