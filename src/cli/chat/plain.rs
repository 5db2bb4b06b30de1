//! Lines in, lines or JSON out: for pipes, scripts and the demo.

use std::collections::HashMap;
use std::io::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use tokio::sync::{broadcast, mpsc};

use super::ChatArgs;
use super::command::{self, Input};
use super::text::{clock, harmless};
use crate::client::core::content::MessageId;
use crate::client::{Client, Connection, ConversationId, Event, Live, Message, Status};
use crate::ids::AccountId;

/// Lines that are read ahead.
const LINES: usize = 64;

struct Plain<'c> {
    client: &'c Client,
    json: bool,
    to: Option<ConversationId>,
    names: HashMap<ConversationId, String>,
}

/// Runs until the input ends and everything is sent, or `/quit`, or an interrupt.
pub(super) async fn run(client: &Client, args: &ChatArgs) -> anyhow::Result<()> {
    let mut plain = Plain { client, json: args.json, to: None, names: HashMap::new() };
    let mut events = client.events().await?;
    let mut live = client.live();
    let mut connection = client.connection();
    plain.hello(args)?;
    if let Some(to) = &args.to {
        plain.open(to.clone().into()).await?;
    }
    let mut lines = read_lines();
    let (mut open, mut read) = (true, Vec::with_capacity(LINES));
    loop {
        tokio::select! {
            count = lines.recv_many(&mut read, LINES), if open => {
                open = count > 0;
                if !plain.input(&mut read).await? { return Ok(()) }
            }
            batch = events.next_batch() => {
                let batch = batch?;
                let Some((last, _)) = batch.last() else { return Ok(()) };
                let last = *last;
                plain.events(batch).await?;
                events.handled(last).await?;
            }
            change = live.recv() => match change {
                Ok(change) => plain.live(&change).await?,
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            },
            () = tokio::time::sleep(Duration::from_millis(50)), if !open && !args.follow => {
                let status = client.sync_status().await?;
                if status.connection == Connection::SignedOut {
                    anyhow::bail!("this device is signed out; --fresh registers it anew");
                }
                if status.unsent == 0 && *connection.borrow_and_update() == Connection::Live {
                    return Ok(());
                }
            }
            interrupted = tokio::signal::ctrl_c() => return interrupted.context("can't listen for interrupts"),
        }
    }
}

/// Standard input, read on a thread of its own, which nobody waits for: it may hang in a read for ever. The end of the channel is
/// the end of the input.
fn read_lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, receiver) = mpsc::channel(LINES);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            let ends = line.is_err();
            if sender.blocking_send(line).is_err() || ends {
                return;
            }
        }
    });
    receiver
}

impl Plain<'_> {
    fn print(&self, text: &str, value: serde_json::Value) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{value}")?
        } else {
            writeln!(out, "{text}")?
        }
        Ok(out.flush()?)
    }

    fn hello(&self, args: &ChatArgs) -> anyhow::Result<()> {
        let address = self.client.address();
        let value = json!({ "ready": { "identity": args.identity, "account": address.account, "device": address.device } });
        self.print(&format!("# you are {}, device {}", args.identity, address.device), value)
    }

    async fn open(&mut self, to: crate::client::Recipient) -> anyhow::Result<()> {
        match self.client.conversation(&to).await {
            Ok(conversation) => self.to = Some(conversation),
            Err(error) => self.complain(&command::why(error))?,
        }
        Ok(())
    }

    fn complain(&self, why: &str) -> anyhow::Result<()> {
        self.print(&format!("! {why}"), json!({ "error": why }))
    }

    /// Texts that came together are kept together; whether to go on.
    async fn input(&mut self, lines: &mut Vec<std::io::Result<String>>) -> anyhow::Result<bool> {
        let mut texts = Vec::new();
        for line in lines.drain(..) {
            let line = line?;
            match command::parse(&line) {
                Input::Text(text) => texts.push(text),
                _ => {
                    self.send(&std::mem::take(&mut texts)).await?;
                    if !self.line(&line).await? {
                        return Ok(false);
                    }
                }
            }
        }
        self.send(&texts).await?;
        Ok(true)
    }

    /// Whether to go on.
    async fn line(&mut self, line: &str) -> anyhow::Result<bool> {
        match command::parse(line) {
            Input::Empty => {}
            Input::Quit => return Ok(false),
            Input::Wrong(why) => self.complain(&why)?,
            Input::Help => self.lines(&command::help())?,
            Input::To(to) => self.open(to).await?,
            Input::CreateGroup(name) => match self.client.create_group(&name).await {
                Ok(group) => {
                    self.to = Some(group.into());
                    self.print(&format!("# you are in {}", harmless(&name)), json!({ "created": group }))?;
                }
                Err(error) => self.complain(&command::why(error))?,
            },
            Input::OpenGroup(name) => match command::find_group(self.client, &name).await {
                Ok(group) => self.to = Some(group.into()),
                Err(why) => self.complain(&why)?,
            },
            Input::Text(text) => self.send(&[text]).await?,
            Input::Read => {
                if let Some(with) = self.to {
                    self.client.mark_read(with, u64::MAX).await?;
                }
            }
            Input::Do(action) => match command::perform(self.client, self.to, action).await {
                Ok(lines) => self.lines(&lines)?,
                Err(why) => self.complain(&why)?,
            },
        }
        Ok(true)
    }

    fn lines(&self, lines: &[String]) -> anyhow::Result<()> {
        if lines.is_empty() { Ok(()) } else { self.print(&lines.join("\n"), json!({ "lines": lines })) }
    }

    /// Sends in order, kept together; if that is refused, each by itself, to say which.
    async fn send(&self, texts: &[String]) -> anyhow::Result<()> {
        if texts.is_empty() {
            return Ok(());
        }
        let Some(to) = self.to else { return self.complain("no conversation is open: --to bob@vignette, or /to bob@vignette") };
        if let Ok(ids) = self.client.send_texts(to, texts).await {
            return texts.iter().zip(ids).try_for_each(|(text, id)| self.sending(to, text, id));
        }
        for text in texts {
            match self.client.send_text(to, text).await {
                Ok(id) => self.sending(to, text, id)?,
                Err(error) => self.complain(&command::why(error))?,
            }
        }
        Ok(())
    }

    fn sending(&self, to: ConversationId, text: &str, id: MessageId) -> anyhow::Result<()> {
        let value = json!({ "sending": { "message_id": id, "conversation": to, "body": text } });
        self.print(&format!("> {}", harmless(text)), value)
    }

    /// The name of an account (a confirmed identity, else the beginning of its id) or a group.
    async fn name(&mut self, of: ConversationId) -> String {
        if let Some(name) = self.names.get(&of) {
            return name.clone();
        }
        let (found, otherwise) = match of {
            ConversationId::Account(account) => {
                let identities = self.client.identities_of(account).await.unwrap_or_default();
                (identities.first().map(ToString::to_string), short(account))
            }
            // Groups are renamed: their names are asked for each time.
            ConversationId::Group(group) => {
                let groups = self.client.groups().await.unwrap_or_default();
                let name = groups.into_iter().find(|one| one.group == group).and_then(|group| group.name);
                return command::group_name(name.as_deref(), group);
            }
        };
        if let Some(name) = &found {
            self.names.insert(of, name.clone());
        }
        found.unwrap_or(otherwise)
    }

    async fn events(&mut self, batch: Vec<(u64, Event)>) -> anyhow::Result<()> {
        let mut shown: HashMap<ConversationId, u64> = HashMap::new();
        for (position, event) in batch {
            let name = match conversation_of(&event) {
                Some(about) => self.name(about).await,
                None => String::new(),
            };
            let name = match &event {
                Event::Message { conversation: ConversationId::Group(_), author, .. } if *author != self.client.account() => {
                    format!("{} in {name}", self.name((*author).into()).await)
                }
                _ => name,
            };
            let value = json!({ "position": position, "with": name, "event": event });
            if self.json {
                self.print("", value)?;
                continue;
            }
            if let Some(line) = describe(&event, &name) {
                self.print(&line, value)?;
            }
            if let Event::Message { message: Some(message), .. } = event
                && !message.outgoing
            {
                shown.insert(message.conversation, message.position);
            }
        }
        // They were shown: they are read.
        for (conversation, position) in shown {
            self.client.mark_read(conversation, position).await?;
        }
        Ok(())
    }

    async fn live(&mut self, live: &Live) -> anyhow::Result<()> {
        let value = json!({ "live": live });
        match live {
            Live::Typing { account, started } => {
                let name = self.name((*account).into()).await;
                let what = if *started { "is typing" } else { "stopped typing" };
                self.print(&format!("# {name} {what}"), value)
            }
            Live::Connection { state } if self.json || *state == Connection::SignedOut => {
                self.print("! this device is signed out; --fresh registers it anew", value)
            }
            Live::Connection { .. } => Ok(()),
        }
    }
}

/// The beginning of an account's id, for accounts without a confirmed identity.
pub(super) fn short(account: AccountId) -> String {
    account.to_string().chars().take(8).collect()
}

/// The conversation an event is about.
pub(super) fn conversation_of(event: &Event) -> Option<ConversationId> {
    match event {
        Event::Message { conversation, .. }
        | Event::Edited { conversation, .. }
        | Event::Deleted { conversation, .. }
        | Event::Reacted { conversation, .. }
        | Event::Tick { conversation, .. }
        | Event::Failed { conversation, .. }
        | Event::ReadElsewhere { conversation }
        | Event::ExpireTimer { conversation, .. }
        | Event::Expired { conversation, .. } => Some(*conversation),
        Event::Contact { account, .. }
        | Event::DeviceAdded { account, .. }
        | Event::IdentityChanged { account, .. }
        | Event::Undecryptable { account, .. }
        | Event::AccountDeleted { account } => Some((*account).into()),
        Event::GroupJoined { group, .. }
        | Event::GroupChanged { group, .. }
        | Event::GroupLeft { group, .. }
        | Event::GroupClosed { group }
        | Event::GroupRejoined { group }
        | Event::GroupBroken { group, .. }
        | Event::GroupStuck { group }
        | Event::GroupUndecryptable { group, .. }
        | Event::GroupRead { group, .. } => Some((*group).into()),
        Event::Gap { .. } | Event::OwnAccountChanged | Event::SignedOut => None,
    }
}

/// An event as a line; `None` if there is nothing to say.
fn describe(event: &Event, name: &str) -> Option<String> {
    Some(match event {
        Event::Message { message: Some(message), .. } => message_line(message, name),
        Event::Message { message: None, .. } | Event::Contact { .. } | Event::ReadElsewhere { .. } | Event::Expired { .. } => return None,
        Event::Edited { message_id, .. } => format!("# {name}: message {message_id} was edited"),
        Event::Deleted { message_id, .. } => format!("# {name}: message {message_id} was deleted"),
        Event::Reacted { emoji: Some(emoji), .. } => format!("# {name}: reaction {}", harmless(emoji)),
        Event::Reacted { emoji: None, .. } => format!("# {name}: reaction taken back"),
        Event::Tick { message_id, status, .. } => format!("# {} {message_id}", tick(*status)),
        Event::Failed { message_id, reason, .. } => format!("! {message_id} was not delivered: {}", failure(*reason)),
        other => notice(other, name)?,
    })
}

fn message_line(message: &Message, name: &str) -> String {
    let body = message.body.as_deref().map_or_else(|| "(deleted)".to_owned(), harmless).replace('\n', "\n    ");
    let who = if message.outgoing { format!("you to {name}") } else { name.to_owned() };
    format!("[{}] {who}: {body}", clock(message.sent_ms))
}

/// A warning or note for a person; `None` for events that are none.
pub(super) fn notice(event: &Event, name: &str) -> Option<String> {
    let held = |was_verified: &bool| if *was_verified { "; you had verified: sending waits for /verify or /accept" } else { "" };
    Some(match event {
        Event::DeviceAdded { device, was_verified, .. } => format!("! {name} has a new device ({device}){}", held(was_verified)),
        Event::IdentityChanged { device, was_verified, .. } => {
            format!("! the keys of {name}'s device {device} changed; compare /safety to be sure{}", held(was_verified))
        }
        Event::Undecryptable { asked_again: true, .. } => format!("! a message of {name} could not be decrypted; it was asked for again"),
        Event::Undecryptable { .. } => format!("! a message of {name} could not be decrypted"),
        Event::Gap { expired: true } => "! messages older than 30 days were not fetched in time and are lost".to_owned(),
        Event::Gap { expired: false } => "! messages were lost before this device could fetch them".to_owned(),
        Event::AccountDeleted { .. } => format!("! {name} deleted the account"),
        Event::ExpireTimer { seconds: 0, .. } => format!("# messages with {name} stay from now on"),
        Event::ExpireTimer { seconds, .. } => format!("# messages with {name} disappear {seconds} s after reading from now on"),
        Event::GroupJoined { .. } => format!("# you are in {name}"),
        Event::GroupChanged { added, removed, name: renamed, roles, epoch, .. } => {
            let mut what = Vec::new();
            if !added.is_empty() {
                what.push(format!("{} joined", added.len()));
            }
            if !removed.is_empty() {
                what.push(format!("{} left", removed.len()));
            }
            if let Some(renamed) = renamed {
                what.push(format!("the name is {} now", harmless(renamed)));
            }
            if *roles {
                what.push("roles changed".to_owned());
            }
            format!("# {name}: {} (epoch {epoch})", what.join(", "))
        }
        Event::GroupLeft { asked: true, .. } => format!("# you left {name}"),
        Event::GroupLeft { asked: false, .. } => format!("! you were removed from {name}"),
        Event::GroupClosed { .. } => format!("! {name} was closed"),
        Event::GroupRejoined { .. } => format!("! this device had lost touch with {name}; what was written meanwhile may be missing"),
        Event::GroupBroken { by, .. } => {
            let by = by.map_or_else(|| "somebody".to_owned(), |by| by.to_string());
            format!("! {name}: a change by {by} can't be right, and nobody took it in; the group is repaired")
        }
        Event::GroupStuck { .. } => format!("! this device can't join {name} again: somebody has to remove and add it"),
        Event::GroupUndecryptable { .. } => format!("! a message in {name} could not be decrypted"),
        Event::OwnAccountChanged => "# your devices or identities changed: /devices".to_owned(),
        Event::SignedOut => "! this device is signed out; --fresh registers it anew".to_owned(),
        _ => return None,
    })
}

/// How far a message has come, in a word.
fn tick(status: Status) -> &'static str {
    match status {
        Status::Pending => "waiting",
        Status::Sent => "sent",
        Status::Delivered => "delivered",
        Status::Read => "read",
        Status::Failed => "failed",
    }
}

/// Why a message was not delivered.
pub(super) fn failure(reason: crate::client::Failure) -> &'static str {
    use crate::client::Failure;
    match reason {
        Failure::Blocked => "you are blocked",
        Failure::NoSuchAccount => "nobody is there",
        Failure::AccountDeleted => "the account was deleted",
        Failure::TooLarge => "it is too large",
        Failure::Expired => "not fetched within 30 days",
        Failure::DevicesKeepChanging => "not all devices could be reached",
        Failure::NotMember => "you are not in the group",
        Failure::Refused => "the broker refused it",
    }
}
