//! Any bytes as a record of topic `metadata`.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use sealpost::metadata::record::{Line, decode};
use sealpost::wire::metadata::MetadataBatch;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(records) = decode(&Bytes::copy_from_slice(bytes)) {
        for record in &records {
            let line = Line::from(record);
            assert!(line.event_id.len() == 32 && line.account.len() == 32);
        }
        let encoded = MetadataBatch { records: records.clone() }.encode_to_vec();
        assert_eq!(decode(&encoded.into()).ok(), Some(records));
    }
});
