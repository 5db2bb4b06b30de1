//! Who a leaf belongs to: a basic credential of 18 bytes. The server vouches for it when it hands out KeyPackages, and members compare.
//!
//! | bytes | what |
//! |---|---|
//! | 1 | version, 1 |
//! | 16 | account id |
//! | 1 | device number, 1 to 127 |

use openmls::prelude::{BasicCredential, Credential};

use crate::ids::{AccountId, DeviceAddr, DeviceId};

/// Bytes of a credential.
pub const LENGTH: usize = 18;
const VERSION: u8 = 1;

/// A leaf's credential names no device, or in no encoding that is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a credential of a device")]
pub struct InvalidCredential;

/// The identity of a device's credential.
pub fn encode(device: DeviceAddr) -> [u8; LENGTH] {
    let mut bytes = [VERSION; LENGTH];
    bytes[1..17].copy_from_slice(device.account.as_bytes());
    bytes[17] = device.device.get();
    bytes
}

/// The device in the identity of a credential.
pub fn decode(bytes: &[u8]) -> Result<DeviceAddr, InvalidCredential> {
    let [VERSION, account @ .., device] = bytes else { return Err(InvalidCredential) };
    let account = AccountId::from_slice(account).map_err(|_| InvalidCredential)?;
    let device = DeviceId::new(u32::from(*device)).map_err(|_| InvalidCredential)?;
    Ok(DeviceAddr { account, device })
}

/// The credential of a device.
pub fn of_device(device: DeviceAddr) -> Credential {
    BasicCredential::new(encode(device).to_vec()).into()
}

/// The device that a credential names.
pub fn device_of(credential: &Credential) -> Result<DeviceAddr, InvalidCredential> {
    let basic = BasicCredential::try_from(credential.clone()).map_err(|_| InvalidCredential)?;
    decode(basic.identity())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: DeviceAddr = DeviceAddr {
        account: AccountId::from_bytes([0xa1; 16]),
        device: match DeviceId::new(3) {
            Ok(device) => device,
            Err(_) => panic!("3 is a device number"),
        },
    };

    /// A golden vector for other implementations; it also stands in docs/client-protocol.md.
    #[test]
    fn golden() {
        let bytes = encode(DEVICE);
        assert_eq!(bytes.map(|byte| format!("{byte:02x}")).concat(), "01a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a103");
        assert_eq!(device_of(&of_device(DEVICE)), Ok(DEVICE));
    }

    #[test]
    fn others_are_refused() {
        let good = encode(DEVICE);
        assert_eq!(decode(&good), Ok(DEVICE));
        assert!(decode(&good[..17]).is_err() && decode(&[good.as_slice(), &[0]].concat()).is_err() && decode(&[]).is_err());
        for (at, byte) in [(0, 2), (17, 0), (17, 128)] {
            let mut bad = good;
            bad[at] = byte;
            assert_eq!(decode(&bad), Err(InvalidCredential));
        }
    }
}
