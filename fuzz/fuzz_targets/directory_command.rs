//! Any bytes as a record of topic `directory`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealpost::wire::event::{self, DirectoryCommand};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(command) = event::decode::<DirectoryCommand>(bytes) {
        let encoded = event::encode(&command);
        assert_eq!(event::decode::<DirectoryCommand>(&encoded).ok(), Some(command));
    }
});
