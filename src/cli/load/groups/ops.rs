//! Changes of the groups while messages go: the owner renews its keys, takes a member out, and adds it again.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::feed::{Hall, times};
use super::making::{base64, fetch_packages, with};
use super::member::Member;
use crate::cli::load::api::{Answer, Api, Registered};
use crate::ids::DeviceAddr;

/// How long the guest may take to hear that it was taken out, before it is added again.
const HEARING: Duration = Duration::from_secs(30);

/// A kind of change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Update,
    Remove,
    Add,
}

impl Op {
    /// In this order they leave a group as it was.
    pub const ALL: [Self; 3] = [Self::Update, Self::Remove, Self::Add];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Update => "update",
            Self::Remove => "remove",
            Self::Add => "add",
        }
    }
}

/// Who changes a group, and who goes and comes.
pub struct Crew {
    pub owner: Arc<Mutex<Member>>,
    /// Its credential.
    pub credential: String,
    /// The last member, where there are two or more.
    pub guest: Option<(Registered, DeviceAddr, Arc<Mutex<Member>>)>,
}

/// How long changes took at the server, by kind.
pub struct Ops {
    pub server: [Histogram<u64>; 3],
    /// Changes that another one came before.
    pub conflicts: u64,
    /// Changes that were made when no messages were sent any more.
    pub late: u64,
}

impl Ops {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self { server: [times()?, times()?, times()?], conflicts: 0, late: 0 })
    }
}

/// The changes of a run.
pub struct Changes {
    pub hall: Rc<Hall>,
    pub api: Api,
    pub clerk: Clerk,
    pub crews: Vec<Crew>,
    /// Of each kind.
    pub each: usize,
    pub length: Duration,
    pub ops: Rc<RefCell<Ops>>,
    /// No messages are sent any more.
    pub over: Rc<Cell<bool>>,
}

impl Changes {
    /// Makes them one after the other, evenly spread, in each group in turn; all of them, also where the machine needs longer for it.
    pub async fn run(self) {
        if let Err(error) = self.all().await {
            *self.hall.failure.borrow_mut() = Some(format!("{error:#}"));
        }
    }

    async fn all(&self) -> anyhow::Result<()> {
        let count = self.each * Op::ALL.len();
        let begun = Instant::now();
        for at in 0..count {
            let due = begun + self.length.mul_f64((at as f64 + 0.5) / count as f64);
            tokio::time::sleep_until(due.into()).await;
            let (group, op) = (at / Op::ALL.len() % self.crews.len(), Op::ALL[at % Op::ALL.len()]);
            if op == Op::Update || self.crews[group].guest.is_some() {
                self.one(group, op).await.with_context(|| format!("to {} failed", op.name()))?;
            }
        }
        Ok(())
    }

    async fn one(&self, group: usize, op: Op) -> anyhow::Result<()> {
        let (hall, crew) = (&self.hall, &self.crews[group]);
        let room = &hall.rooms[group];
        let (mut add, mut remove) = (Vec::new(), Vec::new());
        match (op, &crew.guest) {
            (Op::Remove, Some((_, device, _))) => remove.push(*device),
            (Op::Add, Some((registered, _, member))) => {
                self.heard(group).await;
                let package = with(member, Member::key_package).await?;
                let body = json!({ "key_packages": [{ "id": room.epoch.get() + 1, "key_package": base64(&package) }] });
                self.api.insist(Method::PUT, "/v1/key-packages", Some(&registered.credential), Some(&body)).await?;
                add = fetch_packages(&self.api, &crew.credential, &[&registered.account_id]).await?;
            }
            _ => {}
        }
        let (epoch, outgoing) = with(&crew.owner, move |owner| {
            let epoch = owner.epoch().context("the owner is not in its group")?;
            Ok((epoch, owner.change(&add, &remove)?))
        })
        .await?;
        let mut body = json!({ "commit": base64(&outgoing.commit), "group_info": base64(&outgoing.group_info) });
        if let Some(welcome) = &outgoing.welcome {
            body["welcome"] = base64(welcome).into();
        }
        if op == Op::Remove {
            room.removals.borrow_mut().insert(epoch);
        }
        room.commits.borrow_mut().insert(epoch, (op, hall.now_us()));
        let path = format!("/v1/groups/{}/commits", room.id);
        loop {
            let (answer, took) = self.clerk.post(&path, &crew.credential, &body).await;
            match answer {
                Ok(answer) if answer.status.is_success() => {
                    let mut ops = self.ops.borrow_mut();
                    ops.server[op as usize].saturating_record((took.as_micros() as u64).max(1));
                    ops.late += u64::from(self.over.get());
                    drop(ops);
                    // Unless it was met on the stream before.
                    let merge = move |owner: &mut Member| if owner.epoch() == Some(epoch) { owner.accepted() } else { Ok(()) };
                    with(&crew.owner, merge).await.context("an accepted change can't be merged")?;
                    room.epoch.set(room.epoch.get().max(epoch + 1));
                    return Ok(());
                }
                Ok(answer) if answer.status == StatusCode::CONFLICT => {
                    // Its answer may have been lost with the broker: then it is met on the stream.
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    let drop_it = move |owner: &mut Member| {
                        let lost = owner.epoch() == Some(epoch);
                        if lost { owner.refused().map(|()| lost) } else { Ok(lost) }
                    };
                    if with(&crew.owner, drop_it).await? {
                        self.ops.borrow_mut().conflicts += 1;
                        room.removals.borrow_mut().remove(&epoch);
                    }
                    return Ok(());
                }
                Ok(answer) if answer.status.is_client_error() && answer.status != StatusCode::TOO_MANY_REQUESTS => {
                    anyhow::bail!("it was answered with {}: {}", answer.status, answer.body);
                }
                // The same bytes again.
                _ => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }

    /// Waits until the guest has met its removal, if it is online.
    async fn heard(&self, group: usize) {
        let Some(seat) = self.hall.rooms[group].guest else { return };
        let until = Instant::now() + HEARING;
        while self.hall.inside(seat) {
            if Instant::now() > until {
                return self.hall.expel(seat);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Submits changes on a thread of its own: the sockets keep this one busy, and that is not the server's time.
pub struct Clerk {
    api: Api,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Clerk {
    pub fn new(api: Api) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self { api, runtime: Some(runtime) })
    }

    async fn post(&self, path: &str, credential: &str, body: &Value) -> (anyhow::Result<Answer>, Duration) {
        let (api, path, credential, body) = (self.api.clone(), path.to_owned(), credential.to_owned(), body.clone());
        let Some(runtime) = &self.runtime else { return (Err(anyhow::anyhow!("the run is over")), Duration::ZERO) };
        let call = runtime.spawn(async move {
            let begun = Instant::now();
            let answer = api.call(Method::POST, &path, Some(&credential), Some(&body)).await;
            (answer.map_err(anyhow::Error::from), begun.elapsed())
        });
        call.await.unwrap_or_else(|error| (Err(error.into()), Duration::ZERO))
    }
}

impl Drop for Clerk {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // What is under way nobody waits for any more.
            runtime.shutdown_background();
        }
    }
}
