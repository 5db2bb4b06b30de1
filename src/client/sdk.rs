//! The client as an application sees it.

mod groups;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{broadcast, watch};

use super::core::api::{Api, ApiError, OwnDevice, RegisterDevice};
use super::core::content::{self, Invalid, Kind, MessageId, proto};
use super::engine::{Inner, Running, WorkError};
use super::store::{self, Store};
use super::transport::{HttpTransport, InvalidServer, PrivateCa};
use super::types::{Connection, Conversation, ConversationId, Event, Live, Message, Recipient, SafetyNumber, SyncStatus};
use crate::clock::{Clock, Random, SystemClock, SystemRandom};
use crate::ids::{AccountId, DeviceAddr, DeviceId, Identity, InvalidId};
use crate::wire::stream::Code;
pub use groups::Invited;

/// Events read at once.
const EVENTS_PER_READ: usize = 256;

/// Why a call did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server said no, or was not there; [`ApiError::is_transient`] says whether to try again.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The database; also: keys that must be looked at first, and what can't be sent.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// Not a server's address.
    #[error(transparent)]
    Server(#[from] InvalidServer),
    /// What was to be sent breaks a limit.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// Not an account and not an identity.
    #[error(transparent)]
    Recipient(#[from] InvalidId),
}

impl Error {
    /// The server's code, if it answered with one.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Api(error) => error.code(),
            _ => None,
        }
    }
}

impl From<WorkError> for Error {
    fn from(error: WorkError) -> Self {
        match error {
            WorkError::Api(error) => Self::Api(error),
            WorkError::Store(error) => Self::Store(error),
            WorkError::Incomplete => Self::Api(ApiError::NotUnderstood("a device's keys are not valid".into())),
        }
    }
}

/// What a client takes from around it.
#[derive(Clone)]
pub struct Environment {
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// Where random bytes come from; a CSPRNG.
    pub random: Arc<dyn Random>,
    /// Who vouches for the server, by HTTPS and on the stream; `None`: the public authorities. Not kept in the database.
    pub ca: Option<PrivateCa>,
}

impl Default for Environment {
    fn default() -> Self {
        Self { clock: Arc::new(SystemClock), random: Arc::new(SystemRandom), ca: None }
    }
}

/// What names a recipient: a [`Recipient`], its parts, or text.
pub trait IntoRecipient {
    /// The recipient.
    fn into_recipient(self) -> Result<Recipient, InvalidId>;
}

impl<T: Into<Recipient>> IntoRecipient for T {
    fn into_recipient(self) -> Result<Recipient, InvalidId> {
        Ok(self.into())
    }
}

impl IntoRecipient for &str {
    fn into_recipient(self) -> Result<Recipient, InvalidId> {
        self.parse()
    }
}

impl IntoRecipient for &Recipient {
    fn into_recipient(self) -> Result<Recipient, InvalidId> {
        Ok(self.clone())
    }
}

/// A realm token for an identity from a server in development mode.
pub async fn dev_token(server: &str, identity: &Identity) -> Result<String, Error> {
    dev_token_with(server, identity, &Environment::default()).await
}

/// As [`dev_token`], in an environment.
pub async fn dev_token_with(server: &str, identity: &Identity, environment: &Environment) -> Result<String, Error> {
    Ok(Api::new(HttpTransport::new(server, environment.ca.clone())?, None).dev_token(identity).await?)
}

/// One device of an account. Reading works at once; sending and receiving once it is [started](Client::start).
pub struct Client {
    inner: Arc<Inner>,
    running: Mutex<Option<Running>>,
}

impl Client {
    /// Registers this installation as a device: of the account that the first token's identity has, or of a new one. Further
    /// tokens link their identities to it. The database must not hold an account.
    ///
    /// If the answer is lost, a call with the same database and server finds the device that was made, if one was.
    pub async fn register(server: &str, tokens: Vec<String>, name: &str, database: impl AsRef<Path>) -> Result<Self, Error> {
        Self::register_with(server, tokens, name, database, Environment::default()).await
    }

    /// As [`Self::register`], in an environment.
    pub async fn register_with(
        server: &str,
        tokens: Vec<String>,
        name: &str,
        database: impl AsRef<Path>,
        environment: Environment,
    ) -> Result<Self, Error> {
        let http = HttpTransport::new(server, environment.ca.clone())?;
        let store = open_store(database.as_ref().to_owned(), &environment).await?;
        let at = server.to_owned();
        let keys = store.run(move |db| db.begin_registration(&at)).await?;
        let device = RegisterDevice {
            tokens,
            name: name.to_owned(),
            registration_id: keys.registration_id,
            credential_secret: keys.credential_secret,
            identity_key: keys.identity_key,
            keys: keys.upload,
        };
        let registered = Api::new(http.clone(), None).register(&device).await?;
        let address = server.to_owned();
        let credential = store
            .run(move |db| {
                db.finish_registration(&address, &registered)?;
                db.credential()?.ok_or(store::Error::NoAccount)
            })
            .await?;
        let client = Self::over(Inner::new(store, http, credential, environment.clock, environment.random));
        // So that it can be invited from now on; what does not work now is done as soon as it is started.
        if let Err(error) = client.inner.maintain_key_packages().await {
            tracing::info!(%error, "KeyPackages are published later");
        }
        Ok(client)
    }

    /// Opens the account in a database.
    pub async fn open(database: impl AsRef<Path>) -> Result<Self, Error> {
        Self::open_with(database, Environment::default()).await
    }

    /// As [`Self::open`], in an environment.
    pub async fn open_with(database: impl AsRef<Path>, environment: Environment) -> Result<Self, Error> {
        let store = open_store(database.as_ref().to_owned(), &environment).await?;
        let credential = store.run(|db| db.credential()?.ok_or(store::Error::NoAccount)).await?;
        let http = HttpTransport::new(&credential.server, environment.ca.clone())?;
        Ok(Self::over(Inner::new(store, http, credential, environment.clock, environment.random)))
    }

    fn over(inner: Inner) -> Self {
        Self { inner: Arc::new(inner), running: Mutex::new(None) }
    }

    /// Begins to send and receive, in tasks on the current tokio runtime, until [`Self::stop`]. Does nothing if it runs.
    pub fn start(&self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_none() {
            *running = Some(Running::start(&self.inner));
        }
    }

    /// Ends what [`Self::start`] began, and waits for it. What was not accepted yet is sent after the next start.
    pub async fn stop(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(running) = running {
            running.stop().await;
        }
    }

    /// Stops, and closes the database: returns once another client may open it.
    pub async fn close(self) {
        self.stop().await;
        self.inner.store.close().await;
    }

    /// This device.
    pub fn address(&self) -> DeviceAddr {
        self.inner.credential.address
    }

    /// This account.
    pub fn account(&self) -> AccountId {
        self.inner.credential.address.account
    }

    /// The identities linked to this account, as last heard.
    pub async fn identities(&self) -> Result<Vec<Identity>, Error> {
        Ok(self.inner.store.run(|db| db.own_identities()).await?)
    }

    /// The identities of an account that the directory has confirmed.
    pub async fn identities_of(&self, account: AccountId) -> Result<Vec<Identity>, Error> {
        if account == self.account() {
            return self.identities().await;
        }
        Ok(self.inner.store.run(move |db| db.identities_of(account)).await?)
    }

    /// Chooses the identity that recipients see; else it is the first one.
    pub async fn write_as(&self, identity: &Identity) -> Result<(), Error> {
        let identity = identity.clone();
        Ok(self.inner.store.run(move |db| db.set_writes_as(&identity)).await?)
    }

    /// Whose an identity is. Asks the directory, unless it was asked before.
    pub async fn resolve(&self, recipient: impl IntoRecipient) -> Result<AccountId, Error> {
        match recipient.into_recipient()? {
            Recipient::Account(account) => Ok(account),
            Recipient::Group(_) => Err(InvalidId("an account, not a group").into()),
            Recipient::Identity(identity) => {
                let known = identity.clone();
                if let Some(account) = self.inner.store.run(move |db| db.account_of(&known)).await? {
                    return Ok(account);
                }
                Ok(self.inner.resolve(&identity).await?)
            }
        }
    }

    /// The conversation with somebody, or in a group.
    pub async fn conversation(&self, with: impl IntoRecipient) -> Result<ConversationId, Error> {
        match with.into_recipient()? {
            Recipient::Group(group) => Ok(group.into()),
            other => Ok(self.resolve(other).await?.into()),
        }
    }

    /// Sends a text. Returns once it is kept here; how far it comes is told by events.
    pub async fn send_text(&self, to: impl IntoRecipient, body: &str) -> Result<MessageId, Error> {
        self.send(to, content::text(body)).await
    }

    /// Sends texts in this order, kept in one transaction: all or none.
    pub async fn send_texts(&self, to: impl IntoRecipient, bodies: &[String]) -> Result<Vec<MessageId>, Error> {
        let (to, kinds): (ConversationId, Vec<Kind>) =
            (self.conversation(to).await?, bodies.iter().map(|body| content::text(body)).collect());
        let send = move |db: &store::Db, kind| match to {
            ConversationId::Account(to) => db.send(to, kind, true),
            ConversationId::Group(to) => db.send_to_group(to, kind),
        };
        Ok(self.inner.store.run(move |db| kinds.into_iter().map(|kind| send(db, kind)).collect()).await?)
    }

    /// Sends anything that a content can be. Texts wake the recipient up; the rest waits until its devices come.
    pub async fn send(&self, to: impl IntoRecipient, kind: Kind) -> Result<MessageId, Error> {
        let to = self.conversation(to).await?;
        let urgent = matches!(kind, Kind::Text(_));
        if matches!(kind, Kind::Sent(_) | Kind::Retry(_) | Kind::Read(_) | Kind::GroupRead(_) | Kind::GroupNameKey(_) | Kind::Typing(_)) {
            return Err(Invalid("this kind has a call of its own").into());
        }
        let send = move |db: &store::Db| match to {
            ConversationId::Account(to) => db.send(to, kind, urgent),
            ConversationId::Group(to) => db.send_to_group(to, kind),
        };
        Ok(self.inner.store.run(send).await?)
    }

    /// Answers a message with a text.
    pub async fn reply(&self, to: impl IntoRecipient, target: &Message, body: &str) -> Result<MessageId, Error> {
        let reply_to = Some(content::message_ref(target.author, target.message_id));
        self.send(to, Kind::Text(proto::Text { body: body.to_owned(), reply_to, expire_s: 0 })).await
    }

    /// Reacts to a message; `None` takes the reaction back.
    pub async fn react(&self, target: &Message, emoji: Option<&str>) -> Result<MessageId, Error> {
        let reaction = proto::Reaction {
            target: Some(content::message_ref(target.author, target.message_id)),
            emoji: emoji.unwrap_or_default().to_owned(),
            remove: emoji.is_none(),
        };
        self.send(target.conversation, Kind::Reaction(reaction)).await
    }

    /// Gives a message of one's own another text.
    pub async fn edit(&self, target: &Message, body: &str) -> Result<MessageId, Error> {
        let message_id = bytes::Bytes::copy_from_slice(&target.message_id.0);
        self.send(target.conversation, Kind::Edit(proto::Edit { message_id, body: body.to_owned() })).await
    }

    /// Takes a message of one's own back, for everyone.
    pub async fn delete(&self, target: &Message) -> Result<MessageId, Error> {
        let message_id = bytes::Bytes::copy_from_slice(&target.message_id.0);
        self.send(target.conversation, Kind::Delete(proto::Delete { message_id })).await
    }

    /// Texts of the conversation disappear after this many seconds from now on; 0: they stay.
    pub async fn set_expire_timer(&self, conversation: impl IntoRecipient, seconds: u32) -> Result<MessageId, Error> {
        self.send(conversation, Kind::ExpireTimer(proto::ExpireTimer { seconds })).await
    }

    /// Tells those who are there that one types, or stopped. Lost without harm; groups are not told.
    pub async fn typing(&self, to: impl IntoRecipient, started: bool) -> Result<(), Error> {
        let ConversationId::Account(to) = self.conversation(to).await? else { return Ok(()) };
        if *self.inner.connection.borrow() != Connection::Live {
            return Ok(());
        }
        Ok(self.inner.store.run(move |db| db.send_typing(to, started)).await?)
    }

    /// The person has read the conversation up to this position (see [`Message::position`]; `u64::MAX`: all of it). How many
    /// messages that were.
    pub async fn mark_read(&self, conversation: impl IntoRecipient, up_to: u64) -> Result<usize, Error> {
        let conversation = self.conversation(conversation).await?;
        let mark = move |db: &store::Db| match conversation {
            ConversationId::Account(account) => db.mark_read(account, up_to),
            ConversationId::Group(group) => db.mark_group_read(group, up_to),
        };
        Ok(self.inner.store.run(mark).await?)
    }

    /// Up to `limit` messages of a conversation before a position (`u64::MAX`: the newest), oldest first.
    pub async fn history(&self, conversation: impl Into<ConversationId>, before: u64, limit: usize) -> Result<Vec<Message>, Error> {
        let conversation = conversation.into();
        Ok(self.inner.store.run(move |db| db.history(conversation, before, limit)).await?)
    }

    /// One message.
    pub async fn message(&self, author: AccountId, id: MessageId) -> Result<Option<Message>, Error> {
        Ok(self.inner.store.run(move |db| db.message(author, id)).await?)
    }

    /// All conversations with accounts, the one with the newest message first; groups: [`Self::groups`].
    pub async fn conversations(&self) -> Result<Vec<Conversation>, Error> {
        Ok(self.inner.store.run(|db| db.conversations()).await?)
    }

    /// Events behind a position, oldest first, with their positions; 0 is before the first. An application that keeps its
    /// position in the same transaction as its own state handles each event exactly once.
    pub async fn events_after(&self, position: u64, limit: usize) -> Result<Vec<(u64, Event)>, Error> {
        Ok(self.inner.store.run(move |db| db.events_after(position, limit)).await?)
    }

    /// Events behind the position that [`Events::handled`] kept last: now those there are, then each as it happens.
    pub async fn events(&self) -> Result<Events, Error> {
        let position = self.inner.store.run(|db| db.consumer_position()).await?;
        Ok(Events { inner: self.inner.clone(), position, read: Vec::new().into_iter(), newest: self.inner.store.events() })
    }

    /// What is only worth knowing now.
    pub fn live(&self) -> broadcast::Receiver<Live> {
        self.inner.live.subscribe()
    }

    /// The state of the connection, and its changes.
    pub fn connection(&self) -> watch::Receiver<Connection> {
        self.inner.connection.subscribe()
    }

    /// How far this device is with its server.
    pub async fn sync_status(&self) -> Result<SyncStatus, Error> {
        let unsent = self.inner.store.run(|db| Ok(db.unsent()? + db.unsent_to_groups()?)).await?;
        Ok(SyncStatus { connection: *self.inner.connection.borrow(), unsent, newest_event: *self.inner.store.events().borrow() })
    }

    /// The safety number with an account; see `docs/safety-numbers.md`.
    pub async fn safety_number(&self, with: impl IntoRecipient) -> Result<SafetyNumber, Error> {
        let account = self.resolve(with).await?;
        let fresh = match (self.inner.refresh_own().await, self.inner.refresh_peer(account).await) {
            (Ok(()), Ok(())) => true,
            (Err(WorkError::Store(error)), _) | (_, Err(WorkError::Store(error))) => return Err(error.into()),
            _ => false,
        };
        let (digits, trust) = self.inner.store.run(move |db| db.safety_number(account)).await?;
        Ok(SafetyNumber { digits, trust, fresh })
    }

    /// The person compared these digits with the other side, and they were the same. `false`: the number is another one by now;
    /// compare again.
    pub async fn verify(&self, account: impl IntoRecipient, digits: &str) -> Result<bool, Error> {
        let (account, digits) = (self.resolve(account).await?, digits.to_owned());
        Ok(self.inner.store.run(move |db| db.verify(account, &digits)).await?)
    }

    /// Goes on without verifying an account whose devices or keys changed since it was verified.
    pub async fn accept_identity(&self, account: impl IntoRecipient) -> Result<(), Error> {
        let account = self.resolve(account).await?;
        Ok(self.inner.store.run(move |db| db.accept_identity(account)).await?)
    }

    /// One's own devices.
    pub async fn devices(&self) -> Result<Vec<OwnDevice>, Error> {
        let account = self.inner.api.account().await?;
        let devices = account.devices.clone();
        self.inner.store.run(move |db| db.own_account(&account)).await?;
        Ok(devices)
    }

    /// Renames a device of one's own.
    pub async fn rename_device(&self, device: DeviceId, name: &str) -> Result<(), Error> {
        Ok(self.inner.api.rename_device(device, name).await?)
    }

    /// Revokes a device of one's own; revoking this one signs it out.
    pub async fn revoke_device(&self, device: DeviceId) -> Result<(), Error> {
        self.inner.api.revoke_device(device).await?;
        if device == self.address().device {
            return Ok(self.inner.store.run(|db| db.sign_out()).await?);
        }
        Ok(self.inner.refresh_own().await?)
    }

    /// Links another identity to this account, shown by its realm's token.
    pub async fn link_identity(&self, token: &str) -> Result<(), Error> {
        let account = self.inner.api.link_identity(token).await?;
        Ok(self.inner.store.run(move |db| db.own_account(&account)).await?)
    }

    /// Takes an identity off this account.
    pub async fn unlink_identity(&self, identity: &Identity) -> Result<(), Error> {
        self.inner.api.unlink_identity(identity).await?;
        Ok(self.inner.refresh_own().await?)
    }

    /// Refuses messages of an account.
    pub async fn block(&self, account: impl IntoRecipient) -> Result<(), Error> {
        let account = self.resolve(account).await?;
        Ok(self.inner.api.block(account, true).await?)
    }

    /// Takes that back.
    pub async fn unblock(&self, account: impl IntoRecipient) -> Result<(), Error> {
        let account = self.resolve(account).await?;
        Ok(self.inner.api.block(account, false).await?)
    }

    /// Accounts that are blocked.
    pub async fn blocked(&self) -> Result<Vec<AccountId>, Error> {
        Ok(self.inner.api.blocks().await?)
    }

    /// Ends the account, on all devices. The local history stays until its file is removed.
    pub async fn delete_account(&self) -> Result<(), Error> {
        self.inner.api.delete_account().await?;
        self.stop().await;
        Ok(self.inner.store.run(|db| db.sign_out()).await?)
    }
}

async fn open_store(path: PathBuf, environment: &Environment) -> Result<Store, Error> {
    let (clock, random) = (environment.clock.clone(), environment.random.clone());
    let opened = tokio::task::spawn_blocking(move || Store::open(&path, clock, random)).await;
    Ok(opened.map_err(|_| store::Error::Closed)??)
}

/// Events in order, from where the built-in consumer stopped. See [`Client::events`].
pub struct Events {
    inner: Arc<Inner>,
    position: u64,
    read: std::vec::IntoIter<(u64, Event)>,
    newest: watch::Receiver<u64>,
}

impl Events {
    /// The next event and its position; waits for one. `None` once the client is closed. Cancel-safe: no event is lost.
    pub async fn next(&mut self) -> Result<Option<(u64, Event)>, Error> {
        loop {
            if let Some((position, event)) = self.read.next() {
                self.position = position;
                return Ok(Some((position, event)));
            }
            let newest = *self.newest.borrow_and_update();
            if newest > self.position {
                let from = self.position;
                let read = self.inner.store.run(move |db| db.events_after(from, EVENTS_PER_READ)).await?;
                self.read = read.into_iter();
                if self.read.len() > 0 {
                    continue;
                }
            }
            if self.newest.changed().await.is_err() {
                return Ok(None);
            }
        }
    }

    /// As [`Self::next`], with all that are there already, up to 256: noting them as handled together is much cheaper than one by
    /// one. Empty once the client is closed.
    pub async fn next_batch(&mut self) -> Result<Vec<(u64, Event)>, Error> {
        let Some(first) = self.next().await? else { return Ok(Vec::new()) };
        let batch: Vec<(u64, Event)> = std::iter::once(first).chain(self.read.by_ref()).collect();
        self.position = batch.last().map_or(self.position, |(position, _)| *position);
        Ok(batch)
    }

    /// The application is done with everything up to this position: the next [`Client::events`] begins behind it, also after a
    /// crash. An event whose handling was not noted comes again.
    pub async fn handled(&self, position: u64) -> Result<(), Error> {
        Ok(self.inner.store.run(move |db| db.set_consumer_position(position)).await?)
    }
}
