//! What a person types: a text, or a command behind a slash.

use std::fmt::Write as _;

use crate::client::core::safety;
use crate::client::{Client, ConversationId, GroupRole, Message, Recipient};
use crate::ids::{AccountId, DeviceId, GroupId};

/// A line of input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input {
    /// Nothing to do.
    Empty,
    /// To send.
    Text(String),
    /// Opens a conversation.
    To(Recipient),
    /// Creates a group of this name, and opens it.
    CreateGroup(String),
    /// Opens the group of this name.
    OpenGroup(String),
    /// Leaves.
    Quit,
    /// Lists the commands.
    Help,
    /// Marks the conversation as read.
    Read,
    /// Something for the client, in the conversation that is open.
    Do(Action),
    /// Not understood; says why.
    Wrong(String),
}

/// Something for the client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "HELP says what each does")]
pub(super) enum Action {
    Safety,
    Verify,
    Accept,
    Devices,
    Rename(DeviceId, String),
    Revoke(DeviceId),
    Block,
    Unblock,
    Expire(u32),
    React(String),
    Edit(String),
    Delete,
    Me,
    Groups,
    Invite(Vec<Recipient>),
    Remove(Vec<Recipient>),
    Who,
    Epoch,
    RenameGroup(String),
    Admin(Recipient, bool),
    Owner(Recipient),
    Renew,
    Mute(bool),
    Leave,
    Close,
}

/// What can be typed.
pub(super) const HELP: &[(&str, &str)] = &[
    ("/to user@realm", "talk to somebody"),
    ("/safety", "the safety number, to compare with the other side"),
    ("/verify", "the safety number was compared and is the same"),
    ("/accept", "go on without comparing after keys changed"),
    ("/devices", "your devices"),
    ("/rename N NAME", "rename your device number N"),
    ("/group create NAME", "create a group"),
    ("/group NAME", "talk in a group; /groups lists them"),
    ("/invite user@realm…", "add people to the group"),
    ("/remove user@realm…", "take people out of the group"),
    ("/who", "who is in the group; /admin, /unadmin, /owner user@realm"),
    ("/rename NAME", "give the group another name"),
    ("/epoch", "the epoch of the group's keys; /renew begins the next"),
    ("/mute, /unmute", "do not mark the group as new, or do"),
    ("/leave, /close", "leave the group; end it for everybody"),
    ("/revoke N", "sign your device number N out"),
    ("/react EMOJI", "react to the newest message of the other side"),
    ("/edit TEXT", "replace the text of your newest message"),
    ("/delete", "take your newest message back, for everyone"),
    ("/expire SECONDS", "new messages disappear that long after reading; 0: never"),
    ("/block, /unblock", "refuse the other side's messages, or not"),
    ("/read", "mark everything here as read"),
    ("/me", "who you are"),
    ("/quit", "leave"),
];

/// Understands a line. A text that begins with a slash is written with two.
pub(super) fn parse(line: &str) -> Input {
    let line = line.trim_end_matches(['\r', '\n']);
    let Some(rest) = line.strip_prefix('/') else {
        return if line.trim().is_empty() { Input::Empty } else { Input::Text(line.to_owned()) };
    };
    if rest.starts_with('/') {
        return Input::Text(rest.to_owned());
    }
    let (name, argument) = rest.split_once(' ').map_or((rest, ""), |(name, argument)| (name, argument.trim()));
    let device = |text: &str| text.parse().ok().and_then(|number| DeviceId::new(number).ok());
    let needs = |what: &str| Input::Wrong(format!("/{name} needs {what}"));
    match (name, argument) {
        ("to", "") => needs("an identity: /to bob@vignette"),
        ("to", identity) => identity.parse().map_or_else(|_| needs("an identity: /to bob@vignette"), Input::To),
        ("quit" | "q" | "exit", _) => Input::Quit,
        ("help" | "h" | "?", _) => Input::Help,
        ("read", _) => Input::Read,
        ("safety", _) => Input::Do(Action::Safety),
        ("verify", _) => Input::Do(Action::Verify),
        ("accept", _) => Input::Do(Action::Accept),
        ("devices", _) => Input::Do(Action::Devices),
        ("rename", argument) => match argument.split_once(' ').map(|(number, name)| (device(number), name.trim())) {
            Some((Some(number), name)) if !name.is_empty() => Input::Do(Action::Rename(number, name.to_owned())),
            _ if argument.is_empty() => needs("the group's new name, or a device's number and its new name"),
            _ => Input::Do(Action::RenameGroup(argument.to_owned())),
        },
        ("group", argument) => match argument.split_once(' ').map(|(what, name)| (what, name.trim())) {
            Some(("create", name)) if !name.is_empty() => Input::CreateGroup(name.to_owned()),
            _ if argument.is_empty() || argument == "create" => needs("a name: /group create Hiking"),
            _ => Input::OpenGroup(argument.to_owned()),
        },
        ("groups", _) => Input::Do(Action::Groups),
        ("invite", who) => people(who).map_or_else(|| needs("identities: /invite bob@vignette"), |who| Input::Do(Action::Invite(who))),
        ("remove", who) => people(who).map_or_else(|| needs("identities: /remove bob@vignette"), |who| Input::Do(Action::Remove(who))),
        ("who", _) => Input::Do(Action::Who),
        ("epoch", _) => Input::Do(Action::Epoch),
        ("renew", _) => Input::Do(Action::Renew),
        ("admin" | "unadmin" | "owner", who) => match (who.parse::<Recipient>(), name) {
            (Ok(who), "owner") => Input::Do(Action::Owner(who)),
            (Ok(who), _) => Input::Do(Action::Admin(who, name == "admin")),
            (Err(_), _) => needs("an identity"),
        },
        ("mute", _) => Input::Do(Action::Mute(true)),
        ("unmute", _) => Input::Do(Action::Mute(false)),
        ("leave", _) => Input::Do(Action::Leave),
        ("close", _) => Input::Do(Action::Close),
        ("revoke", number) => device(number).map_or_else(|| needs("a device's number"), |number| Input::Do(Action::Revoke(number))),
        ("block", _) => Input::Do(Action::Block),
        ("unblock", _) => Input::Do(Action::Unblock),
        ("expire", seconds) => seconds.parse().map_or_else(|_| needs("seconds"), |seconds| Input::Do(Action::Expire(seconds))),
        ("react", "") => needs("an emoji"),
        ("react", emoji) => Input::Do(Action::React(emoji.to_owned())),
        ("edit", "") => needs("the new text"),
        ("edit", text) => Input::Do(Action::Edit(text.to_owned())),
        ("delete", _) => Input::Do(Action::Delete),
        ("me", _) => Input::Do(Action::Me),
        _ => Input::Wrong(format!("there is no /{name}; /help lists what there is")),
    }
}

/// Identities, separated by blanks; `None` if one is none, or there is none.
fn people(text: &str) -> Option<Vec<Recipient>> {
    let people: Option<Vec<Recipient>> = text.split_whitespace().map(|one| one.parse().ok()).collect();
    people.filter(|people| !people.is_empty())
}

/// The commands, as lines.
pub(super) fn help() -> Vec<String> {
    HELP.iter().map(|(name, what)| format!("{name:<21}{what}")).collect()
}

/// Does it; what to show, or why it did not work, for a person.
pub(super) async fn perform(client: &Client, with: Option<ConversationId>, action: Action) -> Result<Vec<String>, String> {
    let open = || with.ok_or_else(|| "no conversation is open: /to bob@vignette".to_owned());
    let peer = || open().and_then(|with| with.account().ok_or_else(|| "this is a group: /help lists what goes with groups".to_owned()));
    let group = || with.and_then(ConversationId::group).ok_or_else(|| "no group is open: /group NAME".to_owned());
    let done = |what: &str| Ok(vec![what.to_owned()]);
    match action {
        Action::Safety => safety_lines(client, peer()?).await,
        Action::Verify => {
            let number = client.safety_number(peer()?).await.map_err(why)?;
            match client.verify(peer()?, &number.digits).await.map_err(why)? {
                true => done("Verified. You will be told, and sending stops, if devices or keys change."),
                false => done("The number changed meanwhile: compare it again (/safety)."),
            }
        }
        Action::Accept => client.accept_identity(peer()?).await.map_err(why).and_then(|()| done("Accepted; not verified any more.")),
        Action::Devices => device_lines(client).await,
        Action::Rename(device, name) => client.rename_device(device, &name).await.map_err(why).and_then(|()| done("Renamed.")),
        Action::Revoke(device) => client.revoke_device(device).await.map_err(why).and_then(|()| done("Revoked.")),
        Action::Block => client.block(peer()?).await.map_err(why).and_then(|()| done("Blocked: nothing comes from there any more.")),
        Action::Unblock => client.unblock(peer()?).await.map_err(why).and_then(|()| done("Not blocked any more.")),
        Action::Expire(seconds) => client.set_expire_timer(open()?, seconds).await.map_err(why).map(|_| Vec::new()),
        Action::React(emoji) => {
            let target = newest(client, open()?, false).await?;
            client.react(&target, Some(&emoji)).await.map_err(why).map(|_| Vec::new())
        }
        Action::Edit(text) => {
            let target = newest(client, open()?, true).await?;
            client.edit(&target, &text).await.map_err(why).map(|_| Vec::new())
        }
        Action::Delete => {
            let target = newest(client, open()?, true).await?;
            client.delete(&target).await.map_err(why).map(|_| Vec::new())
        }
        Action::Me => {
            let names: Vec<String> = client.identities().await.map_err(why)?.iter().map(ToString::to_string).collect();
            let address = client.address();
            Ok(vec![names.join(", "), format!("account {}, device {}", address.account, address.device)])
        }
        Action::Groups => group_lines(client).await,
        Action::Invite(who) => {
            let accounts = resolve(client, who).await?;
            let invited = client.invite(group()?, &accounts).await.map_err(why)?;
            match invited.unreachable.len() {
                0 => done("Invited."),
                some => Ok(vec![format!("{some} of {} can't be reached; the others are invited.", accounts.len())]),
            }
        }
        Action::Remove(who) => {
            let accounts = resolve(client, who).await?;
            client.remove_from_group(group()?, &accounts).await.map_err(why).and_then(|()| done("Removed."))
        }
        Action::Who => member_lines(client, group()?).await,
        Action::Epoch => {
            let group = group()?;
            let found = client.groups().await.map_err(why)?.into_iter().find(|one| one.group == group);
            let found = found.ok_or_else(|| "there is no such group".to_owned())?;
            Ok(vec![format!("Epoch {}, {} members, group {group}", found.epoch, found.accounts)])
        }
        Action::RenameGroup(name) => client.rename_group(group()?, &name).await.map_err(why).and_then(|()| done("Renamed.")),
        Action::Admin(who, admin) => {
            let what = if admin { "An admin now." } else { "No admin any more." };
            client.set_group_admin(group()?, who, admin).await.map_err(why).and_then(|()| done(what))
        }
        Action::Owner(who) => {
            client.set_group_owner(group()?, who).await.map_err(why).and_then(|()| done("Passed on; you are an admin now."))
        }
        Action::Renew => client.renew_group_keys(group()?).await.map_err(why).and_then(|()| done("The keys are new.")),
        Action::Mute(muted) => {
            client.mute_group(group()?, muted).await.map_err(why).and_then(|()| done(if muted { "Muted." } else { "Not muted any more." }))
        }
        Action::Leave => client.leave_group(group()?).await.map_err(why).and_then(|()| done("Leaving.")),
        Action::Close => client.close_group(group()?).await.map_err(why).and_then(|()| done("Closed.")),
    }
}

async fn resolve(client: &Client, who: Vec<Recipient>) -> Result<Vec<AccountId>, String> {
    let mut accounts = Vec::with_capacity(who.len());
    for one in who {
        accounts.push(client.resolve(one).await.map_err(why)?);
    }
    Ok(accounts)
}

async fn group_lines(client: &Client) -> Result<Vec<String>, String> {
    let groups = client.groups().await.map_err(why)?;
    let line = |group: crate::client::GroupSummary| {
        let name = super::text::harmless(&group_name(group.name.as_deref(), group.group));
        format!("{name:<32} {:>5} members  {:?}", group.accounts, group.membership)
    };
    Ok(if groups.is_empty() { vec!["No groups yet: /group create NAME".to_owned()] } else { groups.into_iter().map(line).collect() })
}

/// A group's name for a person.
pub(super) fn group_name(name: Option<&str>, group: GroupId) -> String {
    name.map_or_else(|| format!("group {}", group.to_string().chars().take(8).collect::<String>()), ToOwned::to_owned)
}

/// The group of a name, or of the beginning of one.
pub(super) async fn find_group(client: &Client, wanted: &str) -> Result<GroupId, String> {
    let groups = client.groups().await.map_err(why)?;
    let exact = groups.iter().find(|group| group.name.as_deref() == Some(wanted));
    let begins = || groups.iter().find(|group| group.name.as_deref().is_some_and(|name| name.starts_with(wanted)));
    exact.or_else(begins).map(|group| group.group).ok_or_else(|| format!("there is no group {wanted}: /groups lists them"))
}

async fn member_lines(client: &Client, group: GroupId) -> Result<Vec<String>, String> {
    let members = client.group_members(group).await.map_err(why)?;
    let line = |member: crate::client::GroupMember| {
        let name = member.identities.first().map_or_else(|| super::plain::short(member.account), ToString::to_string);
        let role = match member.role {
            GroupRole::Owner => "owner",
            GroupRole::Admin => "admin",
            GroupRole::Member => "",
        };
        let devices = if member.devices.len() == 1 { "1 device".to_owned() } else { format!("{} devices", member.devices.len()) };
        format!("{name:<32} {role:<6} {devices}")
    };
    Ok(members.into_iter().map(line).collect())
}

async fn safety_lines(client: &Client, with: AccountId) -> Result<Vec<String>, String> {
    let number = client.safety_number(with).await.map_err(why)?;
    let groups = safety::grouped(&number.digits);
    let groups: Vec<&str> = groups.split(' ').collect();
    let mut lines: Vec<String> = groups.chunks(4).map(|row| row.join("  ")).collect();
    lines.push(String::new());
    lines.push("The other side sees the same digits with /safety. Compare them where".into());
    lines.push("nobody can change them: in person or on the phone. Then type /verify.".into());
    let mut standing = match number.trust {
        crate::client::Trust::Unverified => "Not verified yet.".to_owned(),
        crate::client::Trust::Verified => "Verified.".to_owned(),
        crate::client::Trust::Changed => "Devices or keys changed since you verified: /verify or /accept.".to_owned(),
    };
    if !number.fresh {
        let _ = write!(standing, " Without a connection: may be out of date.");
    }
    lines.push(standing);
    Ok(lines)
}

async fn device_lines(client: &Client) -> Result<Vec<String>, String> {
    let own = client.address().device;
    let devices = client.devices().await.map_err(why)?;
    let line = |device: crate::client::core::api::OwnDevice| {
        let this = if device.device_id == own { "  (this one)" } else { "" };
        let since = super::text::day(device.created_ms);
        format!("{:>3}  {:<24} since {since}{this}", device.device_id.get(), super::text::harmless(&device.name))
    };
    Ok(devices.into_iter().map(line).collect())
}

async fn newest(client: &Client, with: ConversationId, own: bool) -> Result<Message, String> {
    let history = client.history(with, u64::MAX, 200).await.map_err(why)?;
    let found = history.into_iter().rev().find(|message| message.outgoing == own && message.body.is_some());
    found.ok_or_else(|| "there is no such message here".to_owned())
}

/// An error for a person.
pub(super) fn why(error: crate::client::Error) -> String {
    use crate::wire::stream::Code;
    match error.code() {
        Some(Code::NotFound) => "nobody has registered under that name".into(),
        Some(Code::AccountDeleted) => "that account was deleted".into(),
        Some(Code::Unauthenticated) => "this device is signed out; --fresh registers it anew".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_texts_or_commands() {
        assert_eq!(parse("  "), Input::Empty);
        assert_eq!(parse("hello\n"), Input::Text("hello".into()));
        assert_eq!(parse("//etc"), Input::Text("/etc".into()));
        assert_eq!(parse("/to bob@vignette"), Input::To("bob@vignette".parse().expect("valid")));
        assert!(matches!(parse("/to bob"), Input::Wrong(_)));
        assert_eq!(parse("/rename 2 My phone"), Input::Do(Action::Rename(DeviceId::new(2).expect("valid"), "My phone".into())));
        assert_eq!(parse("/rename x y"), Input::Do(Action::RenameGroup("x y".into())));
        assert!(matches!(parse("/rename"), Input::Wrong(_)));
        assert_eq!(parse("/group create Berge und Seen"), Input::CreateGroup("Berge und Seen".into()));
        assert_eq!(parse("/group Berge"), Input::OpenGroup("Berge".into()));
        assert!(matches!(parse("/group create"), Input::Wrong(_)));
        assert!(matches!(parse("/invite bob@vignette eve@socialink"), Input::Do(Action::Invite(who)) if who.len() == 2));
        assert!(matches!(parse("/invite bob"), Input::Wrong(_)));
        assert_eq!(parse("/expire 60"), Input::Do(Action::Expire(60)));
        assert!(matches!(parse("/nonsense"), Input::Wrong(_)));
        assert_eq!(parse("/edit  a  b"), Input::Do(Action::Edit("a  b".into())));
    }

    #[test]
    fn every_command_of_the_help_exists() {
        for (names, _) in HELP {
            for name in names.split(", ").filter_map(|name| name.split(' ').next()) {
                let known = !matches!(parse(name), Input::Wrong(why) if why.starts_with("there is no"));
                assert!(known, "{name}");
            }
        }
    }
}
