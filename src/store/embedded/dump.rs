//! The whole view at once: what is pending in it, and a digest, to prove that a rebuilt one equals the live one.

use std::sync::Arc;

use fjall::Readable as _;
use sha2::{Digest as _, Sha256};

use super::{EmbeddedStore, blocking, groups, unavailable};
use crate::store::{InboxState, PendingTotals, StoreError, keyspace};

/// What the view holds, in short: the same for the same rows, however they came there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewDump {
    /// One for each keyspace, always in the same order.
    pub sections: Vec<SectionDump>,
}

/// One keyspace of the view.
#[derive(Clone, PartialEq, Eq)]
pub struct SectionDump {
    /// Its name, see `keyspace`.
    pub name: &'static str,
    /// How many rows it has.
    pub rows: u64,
    /// SHA-256 over all keys and values in order, each after its length.
    pub digest: [u8; 32],
}

impl std::fmt::Debug for SectionDump {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} rows, ", self.name, self.rows)?;
        self.digest[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl EmbeddedStore {
    /// Looks through all inboxes, not through what is in them. What is in memory for a window is not in it.
    pub async fn pending_totals(self: &Arc<Self>) -> Result<PendingTotals, StoreError> {
        let view = self.view();
        blocking(move || {
            let mut totals = PendingTotals::default();
            for row in view.db.snapshot().iter(&view.inboxes) {
                let state: InboxState = keyspace::decode_inbox(&row.value().map_err(unavailable)?)?;
                totals.add(&state);
            }
            Ok(totals)
        })
        .await
    }

    /// Reads the whole view, at one point in time.
    pub async fn dump_view(self: &Arc<Self>) -> Result<ViewDump, StoreError> {
        let view = self.view();
        blocking(move || {
            let snapshot = view.db.snapshot();
            let keyspaces = [
                ("pending", &view.pending),
                ("inboxes", &view.inboxes),
                ("marks", &view.marks),
                ("positions", &view.positions),
                ("accounts", &view.accounts),
                ("identities", &view.identities),
                ("device_keys", &view.device_keys),
            ];
            let of_groups = groups::KEYSPACES.into_iter().zip(view.groups.all());
            let section = |(name, keyspace)| {
                let (mut hasher, mut rows) = (Sha256::new(), 0);
                for row in snapshot.iter(keyspace) {
                    let (key, value) = row.into_inner().map_err(unavailable)?;
                    for part in [&key, &value] {
                        hasher.update((part.len() as u64).to_le_bytes());
                        hasher.update(part);
                    }
                    rows += 1;
                }
                Ok(SectionDump { name, rows, digest: hasher.finalize().into() })
            };
            Ok(ViewDump { sections: keyspaces.into_iter().chain(of_groups).map(section).collect::<Result<_, StoreError>>()? })
        })
        .await
    }
}
