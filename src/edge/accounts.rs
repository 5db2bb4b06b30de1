//! What handlers ask of the directory, with its refusals as answers.

use std::sync::Arc;

use crate::directory::{AccountView, DirectoryError};
use crate::edge::EdgeState;
use crate::edge::error::{ApiError, refused};
use crate::ids::{AccountId, DeviceAddr, Identity};
use crate::projector::push::Verdict;
use crate::wire::event::{DirectoryChange, NewDevice};
use crate::wire::stream::Code;

impl From<DirectoryError> for ApiError {
    fn from(error: DirectoryError) -> Self {
        match error {
            DirectoryError::Store(error) => error.into(),
            DirectoryError::Unavailable => Self::new(Code::Unavailable, "the directory takes no changes now"),
            DirectoryError::OutcomeUnknown => Self::new(Code::OutcomeUnknown, "whether the change was made is not known"),
        }
    }
}

/// The account of the device that asks. That it is gone means that the device was revoked meanwhile.
pub async fn own(state: &EdgeState, device: DeviceAddr) -> Result<Arc<AccountView>, ApiError> {
    let view = state.directory.get(device.account).await?.filter(|view| !view.deleted);
    view.ok_or_else(ApiError::unauthenticated)
}

/// Somebody's account.
pub async fn other(state: &EdgeState, account: AccountId) -> Result<Arc<AccountView>, ApiError> {
    let view = state.directory.get(account).await?.ok_or_else(|| ApiError::not_found("there is no such account"))?;
    if view.deleted { Err(ApiError::new(Code::AccountDeleted, "the account was deleted")) } else { Ok(view) }
}

/// The account that an identity is linked to.
pub async fn resolve(state: &EdgeState, identity: &Identity) -> Result<Option<AccountId>, ApiError> {
    Ok(state.directory.resolve(identity).await?)
}

/// Changes an account; returns once the change is applied and visible.
pub async fn change(state: &EdgeState, account: AccountId, change: DirectoryChange) -> Result<(), ApiError> {
    let verdict = state.directory.change(account, change).await?;
    refused(&verdict).map_or(Ok(()), Err)
}

/// Registers a device with the account of the first identity, which is made if there is none, and links the others to it.
/// Nothing is made if one of them is another account's.
pub async fn register(state: &EdgeState, identities: &[Identity], device: NewDevice) -> Result<DeviceAddr, ApiError> {
    let (first, further) = identities.split_first().ok_or_else(|| ApiError::bad_request("a registration needs a token"))?;
    let account = resolve(state, first).await?;
    for identity in further {
        let theirs = resolve(state, identity).await?;
        if theirs.is_some() && theirs != account {
            return Err(refused(&Verdict::Conflict).unwrap_or_else(ApiError::unauthenticated));
        }
    }
    let verdict = state.directory.register(first, device).await?;
    let Verdict::Done(Some(addr)) = verdict else {
        return Err(refused(&verdict).unwrap_or_else(|| ApiError::internal(&"a registration without a device")));
    };
    for identity in further {
        if let Err(error) = change(state, addr.account, DirectoryChange::LinkIdentity { identity: identity.clone() }).await {
            // Somebody was faster, or a cap is reached: a device whose owner gets an error must not stay.
            change(state, addr.account, DirectoryChange::RevokeDevice { device: addr.device }).await?;
            return Err(error);
        }
    }
    Ok(addr)
}

/// Deletes an account.
pub async fn delete(state: &EdgeState, account: AccountId) -> Result<(), ApiError> {
    change(state, account, DirectoryChange::DeleteAccount).await
}
