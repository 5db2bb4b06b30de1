//! The examples in docs/client-protocol.md are true: each is parsed out of the page and checked.

use libsignal_protocol::{PublicKey, kem};
use prost::Message as _;
use sealpost::auth::credential::Credential;
use sealpost::wire::stream::{ClientBatch, ServerBatch, client_frame, server_frame};

const PAGE: &str = include_str!("../docs/client-protocol.md");

/// The first code block behind the heading, without white space.
fn block(heading: &str) -> String {
    let rest = &PAGE[PAGE.find(heading).unwrap_or_else(|| panic!("{heading} is on the page"))..];
    let block = rest.split("```").nth(1).expect("a code block");
    block.lines().skip(1).map(str::trim).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("hex")).collect()
}

fn field(block: &str, name: &str) -> Vec<u8> {
    let rest = &block[block.find(name).expect("the field") + name.len()..];
    bytes(&rest.chars().take_while(|c| c.is_ascii_hexdigit()).collect::<String>())
}

#[test]
fn the_example_credential_is_one() {
    let text = block("#### Example: a credential");
    let parsed = Credential::parse(&text).expect("parses");
    assert_eq!(parsed.device.account.to_string(), "01010101-0101-0101-0101-010101010101");
    assert_eq!(parsed.device.device.get(), 2);
}

#[test]
fn the_example_group_credential_is_one() {
    let device = sealpost::mls::credential::decode(&bytes(&block("#### Example: a group credential"))).expect("decodes");
    assert_eq!(device.account.to_string(), "a1a1a1a1-a1a1-a1a1-a1a1-a1a1a1a1a1a1");
    assert_eq!(device.device.get(), 3);
}

#[test]
fn the_example_signature_verifies() {
    let block = block("#### Example: a signed prekey");
    let identity = PublicKey::deserialize(&field(&block, "identity_key=")).expect("a key");
    let (key, signature) = (field(&block, "public_key="), field(&block, "signature="));
    PublicKey::deserialize(&key).expect("a key");
    assert!(identity.verify_signature(&key, &signature));
    assert!(!identity.verify_signature(&key[1..], &signature), "the type byte is signed too");
}

#[test]
fn the_example_batches_decode_to_what_the_page_says() {
    let batch = ClientBatch::decode(bytes(&block("#### Example: an acknowledgement")).as_slice()).expect("decodes");
    assert!(matches!(&batch.frames[..], [frame] if matches!(&frame.frame, Some(client_frame::Frame::Ack(ack)) if ack.seq == 300)));
    let batch = ClientBatch::decode(bytes(&block("#### Example: following")).as_slice()).expect("decodes");
    let [frame] = &batch.frames[..] else { panic!("one frame") };
    let Some(client_frame::Frame::GroupFollow(follow)) = &frame.frame else { panic!("a group") };
    assert_eq!((follow.group_id.as_ref(), follow.stop), (&[1; 16][..], false));
    let batch = ServerBatch::decode(bytes(&block("#### Example: an answer")).as_slice()).expect("decodes");
    let [frame] = &batch.frames[..] else { panic!("one frame") };
    let Some(server_frame::Frame::Result(result)) = &frame.frame else { panic!("a result") };
    assert_eq!((result.request_id, result.code, result.missing_devices.as_slice()), (7, 6, &[2, 3][..]));
}

#[test]
fn the_key_lengths_on_the_page_are_libsignals() {
    let pq = kem::KeyPair::generate(kem::KeyType::Kyber1024, &mut rand::rng()).public_key.serialize();
    assert_eq!((pq.len(), pq[0]), (1_569, 8));
    assert!(PAGE.contains("1,569 bytes"));
}

/// The page and the API description name the same operations.
#[test]
fn every_operation_is_on_the_page() {
    let document = serde_json::to_value(sealpost::edge::router::document()).expect("serializes");
    for path in document["paths"].as_object().expect("paths").keys().filter(|path| path.starts_with("/v1/")) {
        assert!(PAGE.contains(path.as_str()), "{path} is described");
    }
}
