//! Devices and groups of a run, made through the public API as any client makes them.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use parking_lot::Mutex;
use reqwest::Method;
use serde_json::{Value, json};

use super::feed::Hall;
use super::member::Member;
use super::ops::Crew;
use crate::cli::load::api::{Api, Registered};
use crate::cli::load::keys::Keyset;
use crate::cli::load::progress::Progress;
use crate::ids::{AccountId, DeviceAddr, DeviceId};

/// KeyPackages that are published at once.
const PUBLISHED_AT_ONCE: usize = 32;
/// How long the members may take to get their invitations.
const INVITING: Duration = Duration::from_secs(120);

pub fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

fn unbase64(value: &Value) -> anyhow::Result<Vec<u8>> {
    Ok(STANDARD.decode(value.as_str().context("no bytes where there should be some")?)?)
}

pub fn number(body: &Value, field: &str) -> anyhow::Result<u64> {
    body[field].as_u64().with_context(|| format!("no {field} in the answer"))
}

fn address(registered: &Registered) -> anyhow::Result<DeviceAddr> {
    Ok(DeviceAddr { account: AccountId::from_bytes(registered.target.account), device: DeviceId::new(registered.target.device)? })
}

/// Does something with a member's keys, off this thread.
pub async fn with<T: Send + 'static>(
    member: &Arc<Mutex<Member>>,
    work: impl FnOnce(&mut Member) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let member = Arc::clone(member);
    tokio::task::spawn_blocking(move || work(&mut member.lock())).await?
}

/// Registered members of a group that is not made yet.
pub struct Party {
    pub registered: Vec<Registered>,
    /// The keys of the first of them.
    pub members: Vec<Arc<Mutex<Member>>>,
    pub crew: Crew,
}

/// Registers members and publishes a KeyPackage of each but the first. The keys of the first `kept` stay, and those of the last.
pub async fn register(api: &Api, count: usize, kept: usize, name: &str, keys: &Keyset, progress: &Progress) -> anyhow::Result<Party> {
    let say = |done| progress.say(|| format!("group {name}: {done} of {count} members registered"));
    let registered = api.register_many(&format!("g{name}-"), count, 1, keys, 0, say).await?;
    let mut members = Vec::new();
    let mut guest = None;
    let mut packages = Vec::with_capacity(count);
    for (at, one) in registered.iter().enumerate() {
        let mut member = Member::new(address(one)?);
        if at > 0 {
            packages.push(member.key_package()?);
        }
        let last = at > 0 && at + 1 == count;
        if at < kept || last {
            let member = Arc::new(Mutex::new(member));
            guest = last.then(|| Arc::clone(&member));
            members.extend((at < kept).then_some(member));
        }
        progress.say(|| format!("group {name}: {} of {count} KeyPackages", packages.len()));
        tokio::task::yield_now().await;
    }
    let uploads = registered.iter().skip(1).zip(&packages).map(|(one, package)| async move {
        let body = json!({ "key_packages": [{ "id": 1, "key_package": base64(package) }] });
        api.insist(Method::PUT, "/v1/key-packages", Some(&one.credential), Some(&body)).await
    });
    stream::iter(uploads).buffer_unordered(PUBLISHED_AT_ONCE).try_for_each(|_| async { Ok(()) }).await?;
    let founder = registered.first().context("a group without members")?;
    let guest = match (guest, registered.last()) {
        (Some(member), Some(last)) => Some((last.clone(), address(last)?, member)),
        _ => None,
    };
    let owner = Arc::clone(members.first().context("the founder's keys are kept")?);
    let crew = Crew { owner, credential: founder.credential.clone(), guest };
    Ok(Party { registered, members, crew })
}

/// A KeyPackage of each device of these accounts.
pub async fn fetch_packages(api: &Api, credential: &str, accounts: &[&str]) -> anyhow::Result<Vec<(DeviceAddr, Vec<u8>)>> {
    let body = json!({ "accounts": accounts });
    let fetched = api.insist(Method::POST, "/v1/key-packages/fetch", Some(credential), Some(&body)).await?;
    let mut found = Vec::with_capacity(accounts.len());
    for account in fetched["accounts"].as_array().context("no accounts in the answer")? {
        let id: AccountId = account["account_id"].as_str().context("an account without an id")?.parse()?;
        for device in account["devices"].as_array().context("an account without devices")? {
            let number = u32::try_from(number(device, "device_id")?)?;
            found.push((DeviceAddr { account: id, device: DeviceId::new(number)? }, unbase64(&device["key_package"])?));
        }
    }
    ensure!(found.len() == accounts.len(), "{} KeyPackages for {} accounts", found.len(), accounts.len());
    Ok(found)
}

/// How long the making of a group took.
pub struct Made {
    /// Until all who are online had their Welcome.
    pub took: Duration,
    /// Of that, the commit that added all, at the server.
    pub invite: Duration,
}

/// Makes a group: its founder alone, and then all others by one commit. Their sockets are open, and wait for their invitations.
pub async fn create(hall: &Rc<Hall>, api: &Api, group: usize, party: &Party, progress: &Progress) -> anyhow::Result<Made> {
    progress.say(|| format!("group {group}: being created"));
    let (room, owner) = (&hall.rooms[group], &party.crew.owner);
    let (id, credential) = (room.id, party.crew.credential.as_str());
    let begun = hall.now_us();
    let created = with(owner, move |owner| owner.create(id)).await?;
    let body = json!({ "group_info": base64(&created.group_info), "tree": base64(&created.tree) });
    let mut answer = api.insist(Method::POST, "/v1/groups", Some(credential), Some(&body)).await?;
    let mut invite = Duration::ZERO;
    if party.registered.len() > 1 {
        let accounts: Vec<&str> = party.registered[1..].iter().map(|one| one.account_id.as_str()).collect();
        let add = fetch_packages(api, credential, &accounts).await?;
        let outgoing = with(owner, move |owner| owner.change(&add, &[])).await?;
        let body = json!({
            "commit": base64(&outgoing.commit),
            "welcome": outgoing.welcome.as_deref().map(base64),
            "group_info": base64(&outgoing.group_info),
        });
        let submitted = Instant::now();
        answer = api.insist(Method::POST, &format!("/v1/groups/{id}/commits"), Some(credential), Some(&body)).await?;
        invite = submitted.elapsed();
        with(owner, Member::accepted).await?;
    }
    room.epoch.set(number(&answer, "epoch")?);
    let accepted = hall.now_us();
    let first = hall.seats.iter().position(|seat| seat.group == group).context("a group that nobody follows")?;
    hall.enter(first, number(&answer, "seq")?);
    let online = hall.seats.iter().filter(|seat| seat.group == group).count();
    let until = Instant::now() + INVITING;
    loop {
        let inside = hall.inside_of(group);
        if inside == online {
            break;
        }
        super::failed(hall)?;
        ensure!(Instant::now() < until, "only {inside} of {online} members of group {group} were invited");
        progress.say(|| format!("group {group}: {inside} of {online} members have their Welcome"));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = Duration::from_micros(room.complete_us.get().max(accepted) - begun);
    Ok(Made { took, invite })
}
