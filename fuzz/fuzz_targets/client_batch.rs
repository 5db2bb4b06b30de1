//! Any bytes as a client's frame of the stream: decoding never panics, and what is decoded encodes to the same meaning.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use sealpost::wire::stream::ClientBatch;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(batch) = ClientBatch::decode(bytes) {
        let again = ClientBatch::decode(batch.encode_to_vec().as_slice());
        assert_eq!(again.as_ref(), Ok(&batch));
    }
});
