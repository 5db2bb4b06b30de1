//! Any bytes as a record of topic `groups`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealpost::wire::event;
use sealpost::wire::group_event::GroupEvent;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(event) = event::decode::<GroupEvent<'_>>(bytes) {
        let encoded = event::encode(&event);
        assert_eq!(event::decode::<GroupEvent<'_>>(&encoded).ok(), Some(event));
    }
});
