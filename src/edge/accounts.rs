//! What handlers ask of the directory, with its refusals as answers.

use std::sync::Arc;

use crate::directory::{AccountView, DirectoryError};
use crate::edge::EdgeState;
use crate::edge::error::{ApiError, refused};
use crate::ids::{AccountId, DeviceAddr, Identity};
use crate::projector::push::Verdict;
use crate::wire::event::{AccountRecord, NewDevice};
use crate::wire::stream::Code;

impl From<DirectoryError> for ApiError {
    fn from(error: DirectoryError) -> Self {
        match error {
            DirectoryError::Store(error) => error.into(),
            DirectoryError::Busy => Self::new(Code::Unavailable, "the directory is busy"),
            DirectoryError::TooLarge => Self::new(Code::TooLarge, "the change is larger than the log takes"),
            DirectoryError::Unavailable(cause) => {
                tracing::warn!(%cause, "the directory takes no changes");
                Self::new(Code::Unavailable, "the directory takes no changes now")
            }
            DirectoryError::OutcomeUnknown => Self::new(Code::OutcomeUnknown, "whether the change was made is not known"),
        }
    }
}

/// A change's verdict as an answer.
pub fn done(verdict: Result<Verdict, DirectoryError>) -> Result<(), ApiError> {
    refused(&verdict?).map_or(Ok(()), Err)
}

/// The account of the device that asks, with all that its own devices may see. That device or account are gone means that the
/// device was revoked meanwhile.
pub async fn own(state: &EdgeState, device: DeviceAddr) -> Result<AccountRecord, ApiError> {
    let record = state.directory.record(device.account).await?;
    let mine = record.filter(|record| record.deleted.is_none() && record.devices.iter().any(|one| one.id == device.device));
    mine.ok_or_else(ApiError::unauthenticated)
}

/// Somebody's account.
pub async fn other(state: &EdgeState, account: AccountId) -> Result<Arc<AccountView>, ApiError> {
    let view = state.directory.get(account).await?.ok_or_else(|| ApiError::not_found("there is no such account"))?;
    if view.deleted { Err(ApiError::new(Code::AccountDeleted, "the account was deleted")) } else { Ok(view) }
}

/// A device that is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registered {
    /// Its address.
    pub addr: DeviceAddr,
    /// It is new; else the request was a repeat.
    pub made: bool,
}

/// Registers a device with the account of the first identity, which is made if there is none, and links the others to it.
/// Nothing is made if one of them is another account's, and nothing new if the device is there already.
pub async fn register(state: &EdgeState, identities: &[Identity], device: &NewDevice) -> Result<Registered, ApiError> {
    let conflict = || ApiError::new(Code::Conflict, "one of the identities is another account's");
    let (first, further) = identities.split_first().ok_or_else(|| ApiError::bad_request("a registration needs a token"))?;
    let directory = &state.directory;
    let account = directory.resolve(first).await?;
    for identity in further {
        let theirs = directory.resolve(identity).await?;
        if theirs.is_some() && theirs != account {
            return Err(conflict());
        }
    }
    let (verdict, at) = directory.register(first, device).await?;
    let Verdict::Done(Some(addr)) = verdict else {
        return Err(refused(&verdict).unwrap_or_else(|| ApiError::internal(&"a registration without a device")));
    };
    let record = own(state, addr).await?;
    let there = record.devices.iter().find(|there| there.id == addr.device).ok_or_else(ApiError::unauthenticated)?;
    if there.identity_key != device.identity_key || there.registration_id != device.registration_id {
        return Err(ApiError::new(Code::Conflict, "another device of the account has this credential_secret; each needs its own"));
    }
    let made = there.created == at;
    for identity in further {
        if let Err(error) = done(directory.link(addr.account, identity).await) {
            // Somebody was faster, or a cap is reached: a device whose owner gets an error must not stay.
            if made {
                done(directory.revoke_device(addr.account, addr.device).await)?;
            }
            return Err(error);
        }
    }
    Ok(Registered { addr, made })
}
