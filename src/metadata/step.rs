//! Steps: what happened, seen from an event at its position. Pure.

use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, DeviceId, GroupId, Seq};
use crate::wire::event::{AccountRecord, DirectoryChange, DirectoryCommand, EnvelopesAccepted, ReceiptKind};
use crate::wire::metadata::MetadataKind as Kind;

/// One step in the life of a message, a device or an account; its ids are still readable, so it stays in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// What happened.
    pub kind: Kind,
    /// The position that names the step: of the message's own event, or of the account's.
    pub at: Seq,
    /// Tells steps of one kind, device and event apart.
    pub index: u8,
    /// The message's recipient, who did something in a group, or the account that changed.
    pub account: AccountId,
    /// The account's device, if the step is about one.
    pub device: Option<DeviceId>,
    /// Who sent the message.
    pub sender: Option<DeviceAddr>,
    /// When the message was accepted or the change asked for: chooses the key.
    pub began: UnixMillis,
    /// Bytes of the (largest) ciphertext.
    pub size_bytes: u32,
    /// See `wire::event::flags`.
    pub flags: u8,
    /// Devices that an accepted message is for.
    pub devices: u8,
    /// The group, if the step is about one.
    pub group: Option<GroupId>,
}

/// What is known of an envelope when it is settled.
#[derive(Debug, Clone, Copy)]
pub struct Settled {
    /// Where its event is.
    pub at: Seq,
    /// The device it was for.
    pub recipient: DeviceAddr,
    /// Who sent it.
    pub sender: DeviceAddr,
    /// When it was accepted.
    pub accepted: UnixMillis,
    /// See `wire::event::flags`.
    pub flags: u8,
    /// Bytes of its ciphertext.
    pub size_bytes: usize,
}

impl Step {
    /// A message at `at` was accepted, or rejected. `overhead`: what sealing adds to each content.
    pub fn message(kind: Kind, at: Seq, accepted: &EnvelopesAccepted<'_>, overhead: usize) -> Self {
        let largest = accepted.envelopes.iter().map(|envelope| envelope.sealed.len()).max().unwrap_or(0);
        Self {
            kind,
            at,
            index: 0,
            account: accepted.recipient,
            device: None,
            sender: Some(accepted.sender),
            began: accepted.accepted,
            size_bytes: largest.saturating_sub(overhead) as u32,
            flags: accepted.flags,
            devices: accepted.envelopes.len() as u8,
            group: None,
        }
    }

    /// An envelope was delivered or expired. Named after the message, so that it does not matter which acknowledgement settled it,
    /// and with how many others.
    pub fn settled(kind: ReceiptKind, of: Settled) -> Self {
        Self {
            kind: match kind {
                ReceiptKind::Delivered => Kind::Delivered,
                ReceiptKind::Expired => Kind::Expired,
                ReceiptKind::Rejected => Kind::Rejected,
            },
            at: of.at,
            index: 0,
            account: of.recipient.account,
            device: Some(of.recipient.device),
            sender: Some(of.sender),
            began: of.accepted,
            size_bytes: of.size_bytes as u32,
            flags: of.flags,
            devices: 0,
            group: None,
        }
    }

    /// Somebody did something in a group; without a device: the server, on an account's behalf.
    pub const fn in_group(
        kind: Kind,
        at: Seq,
        group: GroupId,
        by: (AccountId, Option<DeviceId>),
        began: UnixMillis,
        size_bytes: usize,
    ) -> Self {
        let (account, device) = by;
        let (index, sender, size_bytes, group) = (0, None, size_bytes as u32, Some(group));
        Self { kind, at, index, account, device, sender, began, size_bytes, flags: 0, devices: 0, group }
    }

    /// When it happened. `appended`: when the event that brought it about was.
    pub fn time(&self, appended: UnixMillis) -> UnixMillis {
        match self.kind {
            Kind::Delivered | Kind::Expired => appended,
            _ => self.began,
        }
    }
}

/// The steps of a directory command at `at` that was carried out: the difference between the account before and after.
/// `after` is `None` where the account's record did not change.
pub fn of_command(at: Seq, command: &DirectoryCommand, before: Option<&AccountRecord>, after: Option<&AccountRecord>) -> Vec<Step> {
    let step = |kind, device, index| Step {
        kind,
        at,
        index,
        account: command.account,
        device,
        sender: None,
        began: command.at,
        size_bytes: 0,
        flags: 0,
        devices: 0,
        group: None,
    };
    let mut steps = Vec::new();
    match &command.change {
        // The same account, written down once more.
        DirectoryChange::Snapshot(_) => return steps,
        DirectoryChange::PublishKeys { device, .. } => steps.push(step(Kind::KeysPublished, Some(*device), 0)),
        _ => {}
    }
    let Some(after) = after else { return steps };
    if before.is_none() {
        steps.push(step(Kind::AccountCreated, None, 0));
    }
    let (devices, identities) = before.map_or((&[][..], &[][..]), |before| (&before.devices[..], &before.identities[..]));
    let new = after.devices.iter().filter(|new| devices.iter().all(|old| old.id != new.id));
    steps.extend(new.map(|device| step(Kind::DeviceRegistered, Some(device.id), 0)));
    let gone = devices.iter().filter(|old| after.devices.iter().all(|new| new.id != old.id));
    steps.extend(gone.map(|device| step(Kind::DeviceRevoked, Some(device.id), 0)));
    let new = after.identities.iter().filter(|new| !identities.contains(new));
    steps.extend(new.zip(0..).map(|(_, index)| step(Kind::IdentityLinked, None, index)));
    let gone = identities.iter().filter(|old| !after.identities.contains(old));
    steps.extend(gone.zip(0..).map(|(_, index)| step(Kind::IdentityUnlinked, None, index)));
    if after.deleted.is_some() && before.is_some_and(|before| before.deleted.is_none()) {
        steps.push(step(Kind::AccountDeleted, None, 0));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Generation, Offset, RegistrationId};
    use crate::wire::event::DeviceRecord;

    fn account(devices: &[u32], identities: &[&str], deleted: bool) -> AccountRecord {
        let device = |number: &u32| DeviceRecord {
            id: DeviceId::new(*number).expect("valid"),
            name: "phone".to_owned(),
            registration_id: RegistrationId::new(1).expect("valid"),
            identity_key: vec![],
            credential_hash: [0; 32],
            first_message_id: crate::ids::ClientMessageId(1),
            created: UnixMillis(0),
        };
        AccountRecord {
            id: AccountId::from_bytes([1; 16]),
            created: UnixMillis(0),
            deleted: deleted.then_some(UnixMillis(9)),
            identities: identities.iter().map(|identity| identity.parse().expect("valid")).collect(),
            devices: devices.iter().map(device).collect(),
            last_device: 0,
            registrations: 0,
            blocked: vec![],
            applied: Offset(0),
        }
    }

    #[test]
    fn directory_steps_are_the_difference() {
        let at = Seq::at(Generation(0), Offset(3));
        let steps = |change, before: Option<&AccountRecord>, after: Option<&AccountRecord>| -> Vec<(Kind, u8, u8)> {
            let command = DirectoryCommand { account: AccountId::from_bytes([1; 16]), at: UnixMillis(5), reply_to: None, change };
            let steps = of_command(at, &command, before, after);
            assert!(steps.iter().all(|step| step.began == UnixMillis(5) && step.at == at && step.sender.is_none()));
            steps.iter().map(|step| (step.kind, step.device.map_or(0, DeviceId::get), step.index)).collect()
        };
        let other = || DirectoryChange::DeleteAccount;
        let one = account(&[1], &["a@b"], false);
        let two = account(&[1, 2], &["a@b", "c@d"], false);
        let none = account(&[], &[], true);
        assert_eq!(
            steps(other(), None, Some(&one)),
            [(Kind::AccountCreated, 0, 0), (Kind::DeviceRegistered, 1, 0), (Kind::IdentityLinked, 0, 0)]
        );
        assert_eq!(steps(other(), Some(&one), Some(&two)), [(Kind::DeviceRegistered, 2, 0), (Kind::IdentityLinked, 0, 0)]);
        assert_eq!(
            steps(other(), Some(&two), Some(&none)),
            [
                (Kind::DeviceRevoked, 1, 0),
                (Kind::DeviceRevoked, 2, 0),
                (Kind::IdentityUnlinked, 0, 0),
                (Kind::IdentityUnlinked, 0, 1),
                (Kind::AccountDeleted, 0, 0)
            ]
        );
        assert_eq!(steps(other(), Some(&one), None), [], "a repeat changes nothing");
        assert_eq!(steps(DirectoryChange::Snapshot(two.clone()), Some(&one), Some(&two)), []);
        let device = DeviceId::new(1).expect("valid");
        let publish = DirectoryChange::PublishKeys { device, signed_prekey: None, pq_last_resort: None };
        assert_eq!(steps(publish, Some(&one), None), [(Kind::KeysPublished, 1, 0)]);
    }
}
