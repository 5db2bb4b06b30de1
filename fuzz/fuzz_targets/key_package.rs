//! Any bytes as a KeyPackage that a device uploads: refused, or one that names a device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealpost::clock::{Clock as _, SeededRandom, SystemClock};
use sealpost::mls::key_package;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(checked) = key_package::check(bytes, None, SystemClock.now(), &SeededRandom::new(1)) {
        assert!(key_package::encode(checked.key_package).is_ok_and(|again| again == bytes));
    }
});
