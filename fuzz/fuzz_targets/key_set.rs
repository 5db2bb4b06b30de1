//! Any bytes as a realm's key set: parsing never panics, and no more keys than the cap come out.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(keys) = sealpost::auth::jwks::parse(bytes) {
        assert!((1..=sealpost::limits::JWKS_KEYS).contains(&keys.len()));
    }
});
