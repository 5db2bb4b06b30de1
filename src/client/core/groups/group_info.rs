//! Taking an extension out of a GroupInfo. openmls makes one list of extensions for the GroupInfo inside a Welcome, which only joiners
//! read, and the one for everybody; the name key belongs into the first alone.

use openmls_traits::signatures::Signer;

use super::Error;
use crate::mls::framing::{GroupInfo, Malformed};

impl From<Malformed> for Error {
    fn from(malformed: Malformed) -> Self {
        Self::invalid(malformed)
    }
}

/// The same GroupInfo (an MLSMessage) without an extension, signed again.
pub(super) fn without(extension: u16, message: &[u8], signer: &impl Signer) -> Result<Vec<u8>, Error> {
    let sign = |bytes: &[u8]| signer.sign(bytes).map_err(|error| Error::Invalid(format!("signing: {error:?}")));
    GroupInfo::parse(message)?.without(extension, sign)
}
