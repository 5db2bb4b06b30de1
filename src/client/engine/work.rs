//! Work for the server's directory that goes on beside the stream: device lists, key bundles, one's own keys.

use crate::client::core::api::ApiError;
use crate::client::core::keys;
use crate::client::store::Error as StoreError;
use crate::ids::{AccountId, Identity};
use crate::limits;
use crate::wire::stream::Code;

use super::Inner;

/// Why a piece of work did not get done.
#[derive(Debug, thiserror::Error)]
pub(in crate::client) enum WorkError {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("not every device of the account could be reached")]
    Incomplete,
}

impl Inner {
    /// Reads what an account lacks before messages for it can be encrypted, and lets those that wait go.
    pub(in crate::client) async fn repair(&self, account: AccountId) -> Result<(), WorkError> {
        let own = account == self.credential.address.account;
        let need = self.store.run(move |db| db.need(account)).await?;
        if need.list {
            let listed = if own { self.refresh_own().await } else { self.refresh_peer(account).await };
            if let Some(code) = final_code(&listed) {
                self.store.run(move |db| db.unreachable(account, code)).await?;
                return Ok(());
            }
            listed?;
        }
        let need = self.store.run(move |db| db.need(account)).await?;
        let (mut bundles, mut gone) = (Vec::new(), Vec::new());
        for device in need.sessions {
            match self.api.bundles(account, Some(device)).await {
                Ok(found) => bundles.extend(found),
                Err(error) if error.code() == Some(Code::NotFound) => gone.push(device),
                Err(error) if error.code() == Some(Code::AccountDeleted) => {
                    self.store.run(move |db| db.unreachable(account, Code::AccountDeleted)).await?;
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        let rest = self
            .store
            .run(move |db| {
                db.repaired(account, &bundles, &gone)?;
                db.need(account)
            })
            .await?;
        if rest.sessions.is_empty() { Ok(()) } else { Err(WorkError::Incomplete) }
    }

    /// Reads somebody's device list anew.
    pub(in crate::client) async fn refresh_peer(&self, account: AccountId) -> Result<(), WorkError> {
        let peer = self.api.peer(account).await?;
        Ok(self.store.run(move |db| db.set_devices(account, &peer.devices)).await?)
    }

    /// Reads one's own devices and identities anew.
    pub(in crate::client) async fn refresh_own(&self) -> Result<(), WorkError> {
        let account = self.api.account().await?;
        Ok(self.store.run(move |db| db.own_account(&account)).await?)
    }

    /// Asks the directory whose an identity is.
    pub(in crate::client) async fn resolve(&self, identity: &Identity) -> Result<AccountId, WorkError> {
        let peer = self.api.resolve(identity).await;
        let identity = identity.clone();
        match peer {
            Ok(peer) => {
                let account = peer.account_id;
                self.store
                    .run(move |db| {
                        db.confirm(&identity, Some(account))?;
                        // One's own list comes with names, from elsewhere.
                        if account == db.own()?.account { Ok(()) } else { db.set_devices(account, &peer.devices) }
                    })
                    .await?;
                Ok(account)
            }
            Err(error) => {
                if matches!(error.code(), Some(Code::NotFound | Code::AccountDeleted)) {
                    self.store.run(move |db| db.confirm(&identity, None)).await?;
                }
                Err(error.into())
            }
        }
    }

    /// Keeps enough one-time keys on the server, replaces signed ones when they are due, and forgets old ones.
    pub(in crate::client) async fn maintain_keys(&self) -> Result<(), WorkError> {
        let counts = self.api.key_counts().await?;
        let ec = keys::refill(counts.one_time_prekeys).min(limits::PREKEYS_PER_DEVICE);
        let pq = keys::refill(counts.pq_one_time_prekeys).min(limits::PREKEYS_PER_DEVICE);
        let rotate = self.store.run(|db| db.rotation_due()).await?;
        if ec + pq > 0 || rotate {
            let upload = self.store.run(move |db| db.make_keys(ec, pq, rotate)).await?;
            self.api.upload_keys(&upload).await?;
            if rotate {
                self.store.run(|db| db.keys_rotated()).await?;
            }
        }
        Ok(self.store.run(|db| db.prune()).await?)
    }
}

fn final_code(result: &Result<(), WorkError>) -> Option<Code> {
    match result {
        Err(WorkError::Api(error)) => error.code().filter(|code| matches!(code, Code::NotFound | Code::AccountDeleted)),
        _ => None,
    }
}
