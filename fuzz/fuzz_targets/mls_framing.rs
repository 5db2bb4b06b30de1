//! Any bytes where parts of MLS messages are looked for: found within them or refused, and what is put together again can be read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealpost::ids::GroupId;
use sealpost::mls::framing::{self, GroupInfo, Malformed};

fuzz_target!(|bytes: &[u8]| {
    let _ = framing::is_written_in(bytes, GroupId::from_bytes([7; 16]), 0);
    if let Ok(commit) = framing::commit(bytes) {
        let parts = commit.path_keys.iter().map(|key| key.len()).sum::<usize>() + commit.confirmation_tag.len();
        assert!(parts < bytes.len());
    }
    if let Ok(info) = GroupInfo::parse(bytes)
        && let Ok(less) = info.without::<Malformed>(10, |_| Ok(vec![0; 64]))
    {
        let again = GroupInfo::parse(&less).expect("a GroupInfo");
        assert_eq!((again.context, again.confirmation_tag, again.signer), (info.context, info.confirmation_tag, info.signer));
    }
});
