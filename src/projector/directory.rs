//! PLACEHOLDER; the STORE engineer replaces this file. The worker calls `apply_record` with exactly this signature and reads these fields
//! (`position` goes into the same DirectoryWrite; state effects such as destroying the seal key happen inside, before it returns).
use crate::{ids::*, projector::push::Verdict, store::*, wire::event::*};
pub struct A {
    pub account: AccountId,
    pub verdict: Verdict,
    pub reply_to: Option<RequestId>,
}
impl A {
    pub fn inbox_events(&self) -> Vec<InboxEvent<'static>> {
        vec![]
    }
}
pub async fn apply_record(_: &dyn DirectoryStore, _: &dyn KeyStore, c: &DirectoryCommand, _: (Partition, Offset)) -> Result<A, StoreError> {
    Ok(A { account: c.account, verdict: Verdict::Done(None), reply_to: None })
}
