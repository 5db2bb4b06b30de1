//! The tables, by version. A database of an older version is migrated when it is opened; a newer one is refused.

use rusqlite::Connection;

use super::Error;

/// Each entry brings the database from the version before to its own (its index plus one), in one transaction.
const MIGRATIONS: &[&str] = &[V1, V2, V3, V4];

const V1: &str = "
-- Single values: this device's keys and address, credential, cursor, counters.
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE own_identities (identity TEXT PRIMARY KEY) WITHOUT ROWID;

-- What core/state.rs keeps.
CREATE TABLE sessions (account BLOB, device INTEGER, record BLOB NOT NULL, PRIMARY KEY (account, device)) WITHOUT ROWID;
CREATE TABLE remote_identities (account BLOB, device INTEGER, key BLOB NOT NULL, PRIMARY KEY (account, device)) WITHOUT ROWID;
CREATE TABLE prekeys (id INTEGER PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE signed_prekeys (id INTEGER PRIMARY KEY, record BLOB NOT NULL, created_ms INTEGER NOT NULL);
CREATE TABLE kyber_prekeys (id INTEGER PRIMARY KEY, record BLOB NOT NULL, last_resort INTEGER NOT NULL, created_ms INTEGER NOT NULL);
CREATE TABLE kyber_used (kyber INTEGER, signed INTEGER, base_key BLOB, PRIMARY KEY (kyber, signed, base_key)) WITHOUT ROWID;
CREATE TABLE seen (author BLOB, message_id BLOB, seen_ms INTEGER NOT NULL, PRIMARY KEY (author, message_id)) WITHOUT ROWID;
CREATE INDEX seen_by_time ON seen (seen_ms);

-- Other accounts. trust: 0 unverified, 1 verified, 2 changed since. devices_known: the device list was read at least once.
CREATE TABLE contacts (
    account BLOB PRIMARY KEY, trust INTEGER NOT NULL DEFAULT 0, fingerprint TEXT, devices_known INTEGER NOT NULL DEFAULT 0,
    deleted INTEGER NOT NULL DEFAULT 0, expire_s INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE devices (account BLOB, device INTEGER, PRIMARY KEY (account, device)) WITHOUT ROWID;
-- Identities that the directory confirmed, and claims it has not been asked about yet.
CREATE TABLE contact_identities (identity TEXT PRIMARY KEY, account BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX contact_identities_by_account ON contact_identities (account);
CREATE TABLE claims (identity TEXT, account BLOB, PRIMARY KEY (identity, account)) WITHOUT ROWID;
-- Requests to repeat, for each device: see core/repair.rs.
CREATE TABLE asked (account BLOB, device INTEGER, since_ms INTEGER NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (account, device))
    WITHOUT ROWID;

-- status: 0 pending, 1 sent, 2 delivered, 3 read, 4 failed. body is NULL once deleted.
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, conversation BLOB NOT NULL, author BLOB NOT NULL, message_id BLOB NOT NULL,
    sent_ms INTEGER NOT NULL, body TEXT, reply_author BLOB, reply_id BLOB, edited_ms INTEGER NOT NULL DEFAULT 0,
    status INTEGER NOT NULL, failure TEXT, expire_s INTEGER NOT NULL DEFAULT 0, expires_ms INTEGER, unread INTEGER NOT NULL,
    UNIQUE (author, message_id)
);
CREATE INDEX messages_by_conversation ON messages (conversation, id);
CREATE INDEX messages_expiring ON messages (expires_ms) WHERE expires_ms IS NOT NULL;
CREATE INDEX messages_unread ON messages (conversation) WHERE unread = 1;
CREATE TABLE reactions (
    author BLOB, message_id BLOB, reactor BLOB, emoji TEXT NOT NULL, sent_ms INTEGER NOT NULL,
    PRIMARY KEY (author, message_id, reactor)
) WITHOUT ROWID;
-- Edits, deletes and reactions that came before their message.
CREATE TABLE early (
    id INTEGER PRIMARY KEY, author BLOB NOT NULL, message_id BLOB NOT NULL, sender BLOB NOT NULL, content BLOB NOT NULL
);
CREATE INDEX early_by_message ON early (author, message_id);

-- What is sent. state: 0 waits for sessions, 1 ready to send, 2 accepted. Accepted ones are kept for a while, for receipts and for
-- devices that ask for a repeat. envelopes: the encrypted Send; it is sent again as it is until it is answered. message_id: whose text
-- the content holds, so that it goes when that goes; tick: its fate is the message's.
CREATE TABLE outgoing (
    id INTEGER PRIMARY KEY AUTOINCREMENT, recipient BLOB NOT NULL, client_message_id INTEGER NOT NULL, content BLOB, message_id BLOB,
    tick INTEGER NOT NULL, envelopes BLOB, urgent INTEGER NOT NULL, ephemeral INTEGER NOT NULL, state INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    rounds INTEGER NOT NULL DEFAULT 0, resends INTEGER NOT NULL DEFAULT 0, not_before_ms INTEGER NOT NULL DEFAULT 0,
    created_ms INTEGER NOT NULL, UNIQUE (recipient, client_message_id)
);
CREATE INDEX outgoing_open ON outgoing (id) WHERE state < 2;
CREATE INDEX outgoing_open_by_recipient ON outgoing (recipient, client_message_id) WHERE state < 2;
CREATE INDEX outgoing_by_message ON outgoing (message_id) WHERE message_id IS NOT NULL;
CREATE INDEX outgoing_by_time ON outgoing (created_ms);
CREATE TABLE counters (account BLOB PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;

CREATE TABLE events (position INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, event TEXT NOT NULL);
";

const V2: &str = "
-- MLS: what core/state.rs keeps of groups. kind: mls/storage.rs.
CREATE TABLE mls (kind INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, created_ms INTEGER NOT NULL, PRIMARY KEY (kind, key));
CREATE TABLE group_signers (suite INTEGER PRIMARY KEY, key BLOB NOT NULL);
CREATE TABLE group_name_keys (mls_group BLOB PRIMARY KEY, key BLOB NOT NULL) WITHOUT ROWID;
";

const V3: &str = "
-- Groups. state: 0 being created, 1 member, 2 out of touch (joins again), 3 left, 4 closed. cursor: everything up to here was processed;
-- head: the newest item that is known of. leaving: the person asked to leave. due_ms: when this device commits what waits (proposals of
-- others, devices of one's own that came or went); own_devices: that the latter are to be looked at.
CREATE TABLE groups (
    id BLOB PRIMARY KEY, state INTEGER NOT NULL, cursor INTEGER NOT NULL, head INTEGER NOT NULL, epoch INTEGER NOT NULL DEFAULT 0,
    name TEXT, accounts INTEGER NOT NULL DEFAULT 0, muted INTEGER NOT NULL DEFAULT 0, expire_s INTEGER NOT NULL DEFAULT 0,
    leaving INTEGER NOT NULL DEFAULT 0, due_ms INTEGER, own_devices INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE group_invitations (
    mls_group BLOB, epoch INTEGER, seq INTEGER NOT NULL, account BLOB NOT NULL, welcome BLOB NOT NULL, PRIMARY KEY (mls_group, epoch)
) WITHOUT ROWID;
-- What was submitted, or is to be, and has no verdict yet: sent again as it is. kind: 0 a new group (message: its tree), 1 a commit,
-- 2 a proposal. verdict: 0 none, 1 accepted, 2 another commit came first.
CREATE TABLE group_pending (
    mls_group BLOB PRIMARY KEY, kind INTEGER NOT NULL, epoch INTEGER NOT NULL, message BLOB NOT NULL, welcome BLOB, group_info BLOB,
    verdict INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
-- Messages to groups that this device has not met there yet. ciphertext: made right before it is sent, then sent again as it is until it is
-- answered. accepted_ms: when it was; accepted_cursor: how far the group was then.
CREATE TABLE group_outgoing (
    id INTEGER PRIMARY KEY AUTOINCREMENT, mls_group BLOB NOT NULL, client_message_id INTEGER NOT NULL, content BLOB NOT NULL,
    message_id BLOB, tick INTEGER NOT NULL, epoch INTEGER NOT NULL DEFAULT 0, ciphertext BLOB, attempts INTEGER NOT NULL DEFAULT 0,
    not_before_ms INTEGER NOT NULL DEFAULT 0, accepted_ms INTEGER, accepted_cursor INTEGER, UNIQUE (mls_group, client_message_id)
);
-- Up to where members say that they have read.
CREATE TABLE group_reads (mls_group BLOB, account BLOB, seq INTEGER NOT NULL, PRIMARY KEY (mls_group, account)) WITHOUT ROWID;
ALTER TABLE messages ADD COLUMN group_seq INTEGER;
";

const V4: &str = "
-- Repair of groups (store/groups/repair.rs). repair_ms: when a device that is out of touch joins again, NULL: now; broken: because of a commit that
-- nobody could take in; repairs, repaired_ms: how often that was lately, and when last. name_due_ms: when the key of the name is to be told, or
-- asked for; name_told_ms: when somebody told it. joined_epoch: the epoch in which this device came in, or came back.
ALTER TABLE groups ADD COLUMN repair_ms INTEGER;
ALTER TABLE groups ADD COLUMN broken INTEGER NOT NULL DEFAULT 0;
ALTER TABLE groups ADD COLUMN repairs INTEGER NOT NULL DEFAULT 0;
ALTER TABLE groups ADD COLUMN repaired_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE groups ADD COLUMN name_due_ms INTEGER;
ALTER TABLE groups ADD COLUMN name_told_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE groups ADD COLUMN joined_epoch INTEGER NOT NULL DEFAULT 0;
-- Devices that such a commit left behind, with the key of their leaf then: an admin that came back brings them back.
CREATE TABLE group_left_behind (
    mls_group BLOB, account BLOB, device INTEGER, key BLOB NOT NULL, PRIMARY KEY (mls_group, account, device)
) WITHOUT ROWID;
";

/// Brings the database to this version.
pub(super) fn migrate(connection: &Connection) -> Result<(), Error> {
    let version: u32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let version = version as usize;
    if version > MIGRATIONS.len() {
        return Err(Error::Newer(version));
    }
    for (index, migration) in MIGRATIONS.iter().enumerate().skip(version) {
        connection.execute_batch(&format!("BEGIN IMMEDIATE; {migration} PRAGMA user_version = {}; COMMIT;", index + 1))?;
    }
    Ok(())
}
