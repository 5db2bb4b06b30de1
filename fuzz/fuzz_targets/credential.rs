//! Any text as a device credential: refused, or in its one canonical form.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealpost::auth::credential::Credential;

fuzz_target!(|text: &str| {
    if let Ok(credential) = Credential::parse(text) {
        assert_eq!(&*credential.to_text(), text);
    }
});
