//! Any bytes as a record of topic `layout`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealpost::log::layout::{Layout, LayoutRecord};

fuzz_target!(|bytes: &[u8]| {
    let mut layout = Layout::of(16);
    for chunk in bytes.split(|byte| *byte == 0xff) {
        if let Ok(record) = LayoutRecord::decode(chunk) {
            assert_eq!(LayoutRecord::decode(&record.encode()), Ok(record));
            layout.apply(record);
        }
    }
    assert!(layout.is_settled() || layout.partitions_of(layout.newest()).all(|new| !layout.feeds(new).is_empty()));
});
