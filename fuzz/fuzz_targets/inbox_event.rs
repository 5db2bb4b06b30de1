//! Any bytes as a record of topic `inbox`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealpost::wire::event::{self, InboxEvent};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(event) = event::decode::<InboxEvent<'_>>(bytes) {
        let encoded = event::encode(&event);
        assert_eq!(event::decode::<InboxEvent<'_>>(&encoded).ok(), Some(event));
    }
});
