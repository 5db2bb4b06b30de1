//! Any bytes as a Welcome that an edge was given: refused, or cut into Welcomes of one secret each.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealpost::mls::welcome;

fuzz_target!(|bytes: &[u8]| {
    let Ok(parts) = welcome::split(bytes) else { return };
    for key_package_ref in parts.refs() {
        let part = parts.for_ref(key_package_ref).expect("each ref has its part");
        assert!(part.len() <= bytes.len());
        let again = welcome::split(&part).expect("a part is a Welcome");
        assert!(again.refs().eq([key_package_ref]) && again.for_ref(key_package_ref).as_ref() == Some(&part));
    }
});
