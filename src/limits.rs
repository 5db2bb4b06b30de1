//! Every cap in one place, each with its reason. A test one past each stands beside the code that enforces it.

/// Text of one message, in characters: what the platforms promise their users.
pub const TEXT_CHARS: usize = 10_000;
/// Longest realm name, in bytes: it is part of every identity.
pub const REALM_NAME_BYTES: usize = 32;
/// Longest user id within a realm, in bytes: identity providers' `sub` claims are shorter than that.
pub const USER_NAME_BYTES: usize = 128;
/// Devices an account: every message costs an envelope for each.
pub const DEVICES_PER_ACCOUNT: usize = 10;
/// Identities linked to one account.
pub const IDENTITIES_PER_ACCOUNT: usize = 8;
/// Accounts one account may block: the list is read on every send to it.
pub const BLOCKS_PER_ACCOUNT: usize = 1_000;
/// A device's display name, in characters.
pub const DEVICE_NAME_CHARS: usize = 64;
/// Accounts whose devices, blocks and at-rest key an edge keeps in memory; the least used go past that.
pub const CACHED_ACCOUNTS: usize = 50_000;
/// Directory changes of one edge that may wait for their verdict; past that changes are refused (503).
pub const DIRECTORY_WAITERS: usize = 4_096;
/// How long an edge waits for the verdict on a directory change before it answers `outcome_unknown`.
pub const VERDICT_MS: u64 = 10_000;

/// One envelope's ciphertext, in bytes.
pub const ENVELOPE_BYTES: usize = 256 * 1024;
/// One request for one recipient account: an envelope for each of its devices and framing.
pub const SEND_BYTES: usize = DEVICES_PER_ACCOUNT * ENVELOPE_BYTES + 4 * 1024;
/// One WebSocket message, either way: the largest `Send` fits.
pub const FRAME_BYTES: usize = SEND_BYTES + 1024;
/// An ordinary JSON body.
pub const BODY_BYTES: usize = 512 * 1024;
/// A `Send` as JSON: base64 makes a third more of it.
pub const SEND_BODY_BYTES: usize = SEND_BYTES / 3 * 4 + 64 * 1024;

/// One-time prekeys uploaded at once, of each kind.
pub const PREKEYS_PER_UPLOAD: usize = 100;
/// One-time prekeys kept for a device, of each kind.
pub const PREKEYS_PER_DEVICE: usize = 1_000;
/// Calls that may wait for the key store's next commit; more wait in front of the queue. An upload is the largest, 170 KB.
pub const KEY_STORE_QUEUE: usize = 256;
/// Below this many left the device is told to refill.
pub const PREKEYS_LOW_WATER: usize = 20;

/// Accounts in a group.
pub const GROUP_ACCOUNTS: usize = 1_500;
/// Name of a group, in characters.
pub const GROUP_NAME_CHARS: usize = 100;
/// Admins of a group besides its owner: all of them stand in the public state that every joiner reads.
pub const GROUP_ADMINS: usize = 64;
/// One MLS commit, in bytes: adding 1,499 at once was measured at 425 KB.
pub const COMMIT_BYTES: usize = 1024 * 1024;
/// One MLS KeyPackage, in bytes: ours are about 320; other implementations list more capabilities. A hundred fit into a body.
pub const KEY_PACKAGE_BYTES: usize = 2 * 1024;
/// Devices of one request for KeyPackages that are looked after at once: enough to share the store's syncs.
pub const KEY_PACKAGES_AT_ONCE: usize = 128;
/// How long a KeyPackage is valid, in seconds: the 84 days that RFC 9420's implementations accept.
pub const KEY_PACKAGE_LIFETIME_S: u64 = 84 * 24 * 3600;
/// How long a KeyPackage must still be valid when it is handed out and when it is used, in seconds: as long as a commit is kept (30 days) and
/// a day, so that who meets the commit late comes to the same verdict.
pub const KEY_PACKAGE_LEFT_S: u64 = 31 * 24 * 3600;
/// How far clocks of devices and servers may differ when a KeyPackage's lifetime begins, in seconds.
pub const KEY_PACKAGE_SKEW_S: u64 = 3600;
/// Epochs of a group whose messages a member can still read after it moved on: messages sent while commits overtake them.
pub const PAST_EPOCHS: usize = 16;
/// Keys of one sender that a member keeps for messages that come late.
pub const GROUP_OUT_OF_ORDER: u32 = 64;
/// How many messages of one sender and epoch a member may miss and still read the next one; each costs a hash to skip.
pub const GROUP_FORWARD: u32 = 10_000;

/// Groups that one device may follow on a stream, and that one account may be in.
pub const GROUPS_PER_ACCOUNT: usize = 1_000;
/// A request that carries a commit, Welcome and GroupInfo as JSON: base64 makes a third more of them.
pub const GROUP_BODY_BYTES: usize = 2 * COMMIT_BYTES / 3 * 4 + 256 * 1024;
/// A group's tree, in bytes: 270 KB were measured at 1,500 leaves.
pub const GROUP_TREE_BYTES: usize = COMMIT_BYTES;
/// Commits behind a group's snapshot: what is replayed when a projector meets the group again.
pub const GROUP_SNAPSHOT_COMMITS: u64 = 16;
/// Public states of groups that a projector keeps in memory, in bytes of their trees; the least used go past that.
pub const GROUP_STATES_BYTES: usize = 256 * 1024 * 1024;
/// How old a group's last state on the log may be while items come, in milliseconds. A view made anew has what stands behind the first state that the
/// log still has: topic `groups` is kept for 31 days and items for 30, so this must stay below one, with time to notice.
pub const GROUP_STATE_ACTIVE_MS: u64 = 20 * 3600 * 1000;
/// The same of a group in which nothing happens, so that nothing is missed before the state: a few times within what the log keeps.
pub const GROUP_STATE_IDLE_MS: u64 = 7 * 24 * 3600 * 1000;
/// How often a projector looks at all groups for that, in milliseconds: often within the shortest retention, a day.
pub const GROUP_WALK_MS: u64 = 6 * 3600 * 1000;
/// Groups read at once by that look.
pub const GROUP_WALK_PAGE: usize = 256;
/// How long a projector waits between two states or pages while it has nothing else to do, in milliseconds: a million groups take an hour or two.
pub const GROUP_STATE_PAUSE_MS: u64 = 5;
/// Groups of which a projector knows that they want their state said; of more it learns when it meets them again.
pub const GROUP_STATES_DUE: usize = 4_096;
/// States that a projector has on their way to the log.
pub const GROUP_STATES_AT_ONCE: usize = 4;
/// How long a state that was sent to the log is waited for before it is said again, in milliseconds.
pub const GROUP_STATE_AGAIN_MS: u64 = 10 * 60_000;
/// One record of a group's state, in bytes: a group of 1,500 needs two, and none is larger than a commit.
pub const GROUP_STATE_PART_BYTES: usize = 512 * 1024;
/// Records of one state: fifteen thousand leaves, the most that 1,500 accounts can have, fill half of them.
pub const GROUP_STATE_PARTS: u16 = 32;
/// Records of a partition that may come between what a state holds and the state: whoever begins with it reads them again. A projector that is half
/// as far behind says none.
pub const GROUP_STATE_REACH: u64 = 20_000;
/// How often an edge says again that it follows a group, in milliseconds.
pub const GROUP_EDGE_RENEW_MS: u64 = 5 * 60_000;
/// After how long an edge that did not is taken for gone, in milliseconds by the log's clock.
pub const GROUP_EDGE_GONE_MS: u64 = 15 * 60_000;
/// Bytes of group items that a session may queue; past that it is told where its groups are, and fetches.
pub const SESSION_GROUP_BYTES: usize = 4 * 1024 * 1024;
/// Groups that an edge keeps in memory besides those that are followed.
pub const CACHED_GROUPS: usize = 10_000;
/// Who is in them, in bytes: 1,500 members of two devices each are 51 KB.
pub const GROUP_ROSTERS_BYTES: usize = 64 * 1024 * 1024;
/// Trees of groups that an edge keeps at hand, in bytes, for those who come back by an external commit.
pub const GROUP_TREES_BYTES: usize = 32 * 1024 * 1024;
/// Trees that an edge restores at once: each takes a core for up to a second.
pub const GROUP_RESTORES_AT_ONCE: usize = 1;
/// Looks at groups that an edge has under way for those who begin to follow.
pub const GROUP_LOOKS_AT_ONCE: usize = 128;
/// Groups that one device begins to follow in a second, beyond twice [`GROUPS_PER_ACCOUNT`] at once.
pub const GROUP_FOLLOWS_PER_S: u32 = 50;
/// How long an edge stays attached to a group that nobody follows, in milliseconds: phones come back.
pub const GROUP_DETACH_MS: u64 = 30_000;
/// How often an edge looks which groups are to be renewed or given up, in milliseconds.
pub const GROUP_LOOK_MS: u64 = 5_000;

/// How long an undelivered envelope is kept: 30 days.
pub const ENVELOPE_TTL_MS: u64 = 30 * 24 * 3600 * 1000;
/// Pending items kept for one device; past that senders get `inbox_full`.
pub const PENDING_PER_DEVICE: u64 = 1_000_000;
/// Pending bytes kept for one device.
pub const PENDING_BYTES_PER_DEVICE: u64 = 4 * 1024 * 1024 * 1024;

/// How far behind the highest client message id a new one may be: the width of the bitmap that the
/// projector keeps for each pair (sending device, recipient account).
pub const MESSAGE_ID_WINDOW: u64 = 128;

/// Requests of one stream that may be unanswered at once; the stream is not read past that.
pub const SENDS_IN_FLIGHT: usize = 1_024;
/// Answers that one stream may have waiting for its socket; it is not read past that. A client may write a lot before it reads.
pub const ANSWERS_QUEUED: usize = 8 * SENDS_IN_FLIGHT;
/// Envelope bytes sent on a stream and not yet acknowledged; the feed pauses there.
pub const UNACKED_BYTES: usize = 4 * 1024 * 1024;
/// Items a session may queue between projector and socket; past that it catches up from the store.
pub const SESSION_QUEUE_ITEMS: usize = 8_192;
/// Bytes a session may queue between projector and socket.
pub const SESSION_QUEUE_BYTES: usize = 2 * 1024 * 1024;
/// What is aimed at for one server frame: large enough to amortise a write, small enough to stay live.
pub const SERVER_FRAME_TARGET_BYTES: usize = 64 * 1024;

/// One record of the log, in bytes: the largest `Send`, sealed.
pub const RECORD_BYTES: usize = SEND_BYTES + 64 * 1024;
/// Bytes waiting for the log's next commit; past that appends are refused (503).
pub const LOG_QUEUE_BYTES: usize = 64 * 1024 * 1024;
/// Bytes of one commit of the log: one write and one sync; a single larger record goes alone.
pub const LOG_CHUNK_BYTES: usize = 4 * 1024 * 1024;
/// Recent records that the log keeps in memory for consumers that keep up; older ones are read from disk.
pub const LOG_TAIL_BYTES: usize = 64 * 1024 * 1024;
/// Recent records that the log keeps in memory although every consumer has had them.
pub const LOG_TAIL_KEPT_BYTES: usize = 2 * 1024 * 1024;
/// Requests to the CQL cluster at once, of one process: enough to keep it busy, few enough to leave it to others.
pub const CQL_IN_FLIGHT: usize = 128;
/// Writes of a flush at once: nobody waits for a flush, and what somebody waits for must not stand behind thousands of its rows.
pub const CQL_WRITES_AT_ONCE: usize = 8;
/// How long one request to the CQL cluster may take, in milliseconds; past it the store counts as unavailable and is asked again.
pub const CQL_REQUEST_MS: u64 = 5_000;
/// How long one connection to a CQL server may take, in milliseconds.
pub const CQL_CONNECT_MS: u64 = 5_000;
/// How long opening the CQL store may take, in milliseconds.
pub const CQL_OPEN_MS: u64 = 10_000;
/// Rows asked for in one request to the CQL cluster.
pub const CQL_PAGE_ROWS: usize = 512;
/// Buckets and days of inboxes that a process knows to be listed; more are listed again.
pub const CQL_LISTED: usize = 200_000;
/// What is aimed at for one record of the push topic, in bytes: large enough to share a request, small enough to stay live.
pub const PUSH_RECORD_BYTES: usize = 128 * 1024;
/// Bytes that a consumer of the log is given at once.
pub const LOG_BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Partitions of one topic of the embedded log.
pub const LOG_PARTITIONS: u16 = 1_024;
/// Consumer groups of the embedded log; each holds retention back.
pub const LOG_GROUPS: usize = 64;
/// Consumers of one group.
pub const LOG_GROUP_MEMBERS: usize = 256;
/// Old segments whose file and index stay open for readers that lag.
pub const LOG_OPEN_SEGMENTS: usize = 4;

/// What a record that waits for Kafka counts besides its payload: the driver's and our own bookkeeping.
pub const KAFKA_RECORD_OVERHEAD_BYTES: usize = 256;
/// Largest Kafka message: a record and its framing. Topics must take that much (`max.message.bytes`).
pub const KAFKA_MESSAGE_BYTES: usize = RECORD_BYTES + 16 * 1024;
/// Records that go to Kafka in one batch of a partition, in bytes; a single larger record goes alone.
pub const KAFKA_BATCH_BYTES: usize = 1024 * 1024;
/// How long Kafka may take to acknowledge an append, retries included; after that its outcome is unknown. Longer than the
/// fail-over of a broker, shorter than people wait.
pub const KAFKA_DELIVERY_MS: u64 = 15_000;
/// How long a look-up (bounds, committed positions, a read) may take.
pub const KAFKA_CALL_MS: u64 = 10_000;
/// How long opening waits for a broker and for the topics' leaders.
pub const KAFKA_OPEN_MS: u64 = 10_000;
/// How long a topic that is missing may only be news that has not reached the broker yet.
pub const KAFKA_NEWS_MS: u64 = 2_000;
/// Bytes that the driver fetches ahead for one consumer.
pub const KAFKA_PREFETCH_BYTES: usize = 16 * 1024 * 1024;
/// Bytes that a consumer of Kafka is given at once: copying them is a millisecond or two of its task.
pub const KAFKA_CONSUMED_BYTES: usize = 1024 * 1024;
/// How long an owner of partitions may stay away from the log before they go to somebody else: longer than a store's outage that
/// operators would sit out.
pub const KAFKA_OWNER_AWAY_MS: u64 = 120_000;
/// Connections for reads without a group that are kept for the next one.
pub const KAFKA_IDLE_READERS: usize = 2;
/// Bytes a coalescing window may hold in memory before it is written early.
pub const WINDOW_BYTES: usize = 64 * 1024 * 1024;
/// How long an envelope may stay in memory only (the log has it) before it is written to the store.
pub const WINDOW_MS: u64 = 1_000;
/// On a cluster dedupe marks are written over so many windows: 2,000 rows at once take a CQL server both cores of a small machine for
/// up to a quarter of a second, each second.
pub const CLUSTER_MARK_WINDOWS: usize = 8;
/// How long a first message between two people waits for the store to say which ids were seen, in milliseconds. Several times what a
/// store takes under load; past it the message is accepted all the same, since the projector knows.
pub const MARK_WAIT_MS: u64 = 100;
/// Records that a projector applies at most before it writes all marks and its position: what a takeover applies again.
pub const TRAIL_RECORDS: u64 = 100_000;
/// How soon receipts leave, and items of devices without a stream are readable by polls: long enough to put many together.
pub const RECEIPT_DELAY_MS: u64 = 25;
/// The same on a cluster, where each partition's share is a request of its own.
pub const CLUSTER_RECEIPT_DELAY_MS: u64 = 60;
/// How long an edge gathers acknowledgements before it appends them: far below the coalescing window, so that what is acknowledged
/// still never reaches the store.
pub const ACK_DELAY_MS: u64 = 5;
/// The same on a cluster, where each partition's share is a request of its own.
pub const CLUSTER_ACK_DELAY_MS: u64 = 40;
/// Entries in one `Receipts` event; more go into the next.
pub const RECEIPT_ENTRIES: usize = 1_024;
/// How long what is accepted may wait for the projector; past that sends are refused (503) until it has caught up by half. Above any
/// stall of a disk that keeps up on the whole, far below what a person takes for lost.
pub const LAG_MS: u64 = 5_000;
/// How often that is looked at: each look asks the log for the end of each partition.
pub const LAG_LOOK_MS: u64 = 100;
/// One record of topic `metadata`, in bytes: several hundred steps share a record.
pub const METADATA_BATCH_BYTES: usize = 64 * 1024;
/// Bytes of metadata on their way to the log in one coalescing window; the projector waits past that.
pub const METADATA_UNACKED_BYTES: usize = 8 * 1024 * 1024;
/// Accounts whose pseudonyms a projector remembers, for each period; all are forgotten past that.
pub const METADATA_PSEUDONYMS: usize = 200_000;
/// Steps of traces that wait for the collector; past that they are dropped.
pub const TRACE_QUEUE_STEPS: usize = 4_096;
/// How long steps of traces are gathered before they are sent.
pub const TRACE_DELAY_MS: u64 = 1_000;
/// How long the collector may take for a batch.
pub const TRACE_EXPORT_MS: u64 = 5_000;
/// How often it is said that the collector takes nothing.
pub const TRACE_COMPLAINT_MS: u64 = 60_000;
/// How often a cluster's lag is looked at for metrics: as often as they are read.
pub const CLUSTER_LAG_LOOK_MS: u64 = 5_000;
/// How often those who append look for a new layout of the partitions.
pub const LAYOUT_LOOK_MS: u64 = 100;
/// How long a new generation is open before the old one is fenced: ten looks, for all processes to have seen it.
pub const LAYOUT_FENCE_MS: u64 = 1_000;
/// The same within one process, whose threads see it at once and only have to append what they had in hand.
pub const LAYOUT_KNOWN_MS: u64 = 300;
/// How long a process that saw a change too late appends nothing: what it appended before is passed on meanwhile.
pub const LAYOUT_HOLD_MS: u64 = 1_000;
/// Numbers of partitions that a log can have had.
pub const LAYOUT_GENERATIONS: usize = 64;
/// Marks of one recipient that are read at once; of whom more write to, each is read when it is needed.
pub const WHOLE_MARKS: usize = 128;
/// Recipients of whom an edge knows that it read all their marks.
pub const WHOLE_RECIPIENTS: usize = 20_000;
/// Inboxes and dedupe marks that a projector keeps in memory; clean ones are dropped past that.
pub const HOT_ENTRIES: usize = 200_000;

/// Envelopes in one page of the HTTP inbox.
pub const INBOX_PAGE_ITEMS: usize = 500;
/// Bytes in one page of the HTTP inbox.
pub const INBOX_PAGE_BYTES: usize = 4 * 1024 * 1024;
/// Longest long-poll of the HTTP inbox, in seconds.
pub const LONG_POLL_S: u64 = 60;

/// One realm token (JWT), in bytes: identity providers' are 1 to 2 KiB.
pub const REALM_TOKEN_BYTES: usize = 8 * 1024;
/// A realm's published key set, in bytes.
pub const JWKS_BYTES: usize = 256 * 1024;
/// Keys used of a realm's key set: rotation needs two or three.
pub const JWKS_KEYS: usize = 64;
/// Clock skew between a realm and us, in milliseconds.
pub const TOKEN_LEEWAY_MS: u64 = 60_000;
/// At least this long between two fetches of a realm's keys that an unknown key id asks for.
pub const JWKS_REFRESH_MIN_MS: u64 = 10_000;
/// A realm's keys are fetched this often in the background.
pub const JWKS_REFRESH_MS: u64 = 5 * 60_000;
/// Keys of a realm whose URL fails are trusted this long.
pub const JWKS_STALE_MAX_MS: u64 = 24 * 3_600_000;
/// Devices or addresses that a rate limiter tells apart; past that, idle ones are forgotten, then all.
pub const RATE_KEYS: usize = 200_000;

/// How often an edge looks at its streams: the grain of the three below.
pub const HEARTBEAT_TICK_MS: u64 = 5_000;
/// Ticks of silence after which a client is pinged; after twice as many the stream is closed.
pub const HEARTBEAT_TICKS: u32 = 6;
/// Ticks without an acknowledgement after which a stream whose feed is paused is closed.
pub const STALLED_TICKS: u32 = 12;
/// Ticks between clean-ups of rate limiters.
pub const TIDY_TICKS: u32 = 12;
/// How long a new stream waits for the projector to meet its attachment, in milliseconds. Sends are taken meanwhile, so only a projector that does
/// not come back ends it: the next try may find another edge.
pub const ATTACH_MS: u64 = 600_000;
/// The same for a request to follow a group.
pub const GROUP_ATTACH_MS: u64 = 15_000;
/// Pairs (sending device, recipient account) whose highest message id an edge keeps at hand.
pub const CACHED_MARKS: usize = 100_000;
/// Items in one page of a stream's catch-up.
pub const CATCH_UP_ITEMS: usize = 1_024;
/// Bytes in one page of a stream's catch-up: a few server frames, so that pages and frames do not wait for each other.
pub const CATCH_UP_BYTES: usize = 1024 * 1024;
/// How often a draining edge closes some of its streams, in milliseconds.
pub const DRAIN_STEP_MS: u64 = 20;
/// How long clients of a draining edge are told to wait, in milliseconds: from this to twice of it.
pub const DRAIN_RETRY_MS: u32 = 500;
/// A stream's read buffer: several ordinary envelopes a system call. Idle streams keep it, so it is small.
pub const WS_READ_BUFFER_BYTES: usize = 4 * 1024;
/// What a stream may buffer before it writes: one server frame.
pub const WS_WRITE_BUFFER_BYTES: usize = SERVER_FRAME_TARGET_BYTES * 2;
/// A request's head, in bytes, and what one connection buffers of a body.
pub const HTTP_BUFFER_BYTES: usize = 64 * 1024;
/// Header fields of one request.
pub const HTTP_HEADERS: usize = 64;
/// Addresses in `X-Forwarded-For` that are looked at.
pub const FORWARDED_HOPS: usize = 16;
