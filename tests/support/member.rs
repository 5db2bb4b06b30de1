//! A device that speaks the wire by hand and MLS with the SDK's engine.
#![allow(dead_code, reason = "each test file uses a part of it")]

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use prost::Message as _;
use reqwest::{Method, StatusCode};
use sealpost::client::core::groups::{Change, Created, Engine, Error, Group, Outgoing, Received};
use sealpost::client::core::state::{MemoryState, StateKey, StateTx, encode_address};
use sealpost::clock::{Clock as _, SystemClock, SystemRandom};
use sealpost::ids::{DeviceAddr, GroupId};
use sealpost::testing::{RawDevice, RawStream};
use sealpost::wire::stream::{self, GroupHead, GroupInvitation, GroupItem, client_frame, server_frame::Frame};
use serde_json::{Value, json};

pub fn b64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

pub fn unb64(value: &Value) -> Vec<u8> {
    STANDARD.decode(value.as_str().expect("a text")).expect("base64")
}

pub struct Member {
    pub device: RawDevice,
    pub state: MemoryState,
    pub group: GroupId,
    /// The last item that it took in.
    pub cursor: u64,
    pub next_id: u64,
    /// Repeats what was not answered, or answered 5xx: its broker is killed now and then.
    pub patient: bool,
}

impl Member {
    pub fn new(device: RawDevice, group: GroupId) -> Self {
        let mut state = MemoryState::default();
        state.commit([(StateKey::OwnAddress, Some(encode_address(device.addr).into()))].into());
        Self { device, state, group, cursor: 0, next_id: 1, patient: false }
    }

    pub fn addr(&self) -> DeviceAddr {
        self.device.addr
    }

    /// One transaction; committed if it works.
    pub fn run<T>(&mut self, work: impl FnOnce(&Engine<'_, '_>) -> Result<T, Error>) -> Result<T, Error> {
        let tx = StateTx::new(&self.state);
        let done = work(&Engine::new(&tx, &SystemRandom)?);
        let (writes, _) = tx.finish();
        if done.is_ok() {
            self.state.commit(writes);
        }
        done
    }

    pub fn in_group<T>(&mut self, work: impl FnOnce(&mut Group, &Engine<'_, '_>) -> Result<T, Error>) -> Result<T, Error> {
        let group = self.group;
        self.run(|engine| work(&mut engine.load(group)?.ok_or(Error::NotMember)?, engine))
    }

    pub fn key_package(&mut self) -> Vec<u8> {
        self.run(|engine| engine.key_packages(1, SystemClock.now())).expect("a KeyPackage").remove(0)
    }

    pub fn path(&self, rest: &str) -> String {
        format!("/v1/groups/{}{rest}", self.group)
    }

    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let mut failed = 0;
        loop {
            match self.device.call(method.clone(), path, body.clone()).await {
                Ok(answer) if !self.patient || !answer.0.is_server_error() => return answer,
                // A connection on which a body was too large to be read is closed behind the answer.
                Err(error) if !self.patient && failed > 2 => panic!("no answer: {error}"),
                Err(_) if !self.patient => failed += 1,
                _ => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
            }
        }
    }

    pub fn make(&mut self) -> Created {
        let group = self.group;
        self.run(|engine| Ok(engine.create(group, "Berge", None, SystemClock.now())?.1)).expect("a group")
    }

    pub async fn create(&mut self) {
        let created = self.make();
        let body = json!({ "group_info": b64(&created.group_info), "tree": b64(&created.tree) });
        let (status, answer) = self.call(Method::POST, "/v1/groups", Some(body.clone())).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
        assert_eq!((answer["group_id"].as_str(), answer["epoch"].as_u64()), (Some(self.group.to_string().as_str()), Some(0)));
        let again = self.call(Method::POST, "/v1/groups", Some(body)).await;
        assert_eq!(again, (status, answer.clone()), "the same again is answered the same");
        self.cursor = answer["seq"].as_u64().expect("a seq");
    }

    pub fn change(&mut self, change: &Change<'_>) -> Outgoing {
        self.in_group(|group, engine| group.change(engine, change, SystemClock.now())).expect("a change")
    }

    pub fn commit_body(outgoing: &Outgoing) -> Value {
        let mut body = json!({ "commit": b64(&outgoing.commit), "group_info": b64(&outgoing.group_info) });
        if let Some(welcome) = &outgoing.welcome {
            body["welcome"] = b64(welcome).into();
        }
        body
    }

    pub async fn submit(&self, outgoing: &Outgoing) -> (StatusCode, Value) {
        self.call(Method::POST, &self.path("/commits"), Some(Self::commit_body(outgoing))).await
    }

    /// A commit that is taken.
    pub async fn commit(&mut self, change: &Change<'_>) -> u64 {
        let outgoing = self.change(change);
        let (status, answer) = self.submit(&outgoing).await;
        assert_eq!((status, answer["epoch"].as_u64()), (StatusCode::OK, Some(outgoing.epoch)), "{answer}");
        self.in_group(|group, engine| group.accepted(engine)).expect("it was pending");
        self.cursor = answer["seq"].as_u64().expect("a seq");
        self.cursor
    }

    pub async fn add(&mut self, others: &mut [Member]) -> u64 {
        let packages: Vec<_> = others.iter_mut().map(|other| (other.addr(), other.key_package())).collect();
        let add = packages.iter().map(|(device, bytes)| (*device, bytes.as_slice())).collect();
        self.commit(&Change { add, ..Change::default() }).await
    }

    pub async fn invitation(&self) -> GroupInvitation {
        let (status, page) = self.call(Method::GET, "/v1/inbox?wait_s=20", None).await;
        assert_eq!(status, StatusCode::OK, "{page}");
        let items = page["items"].as_array().expect("items");
        let envelope = items.iter().map(|item| &item["envelope"]).find(|envelope| envelope["type"] == 16).expect("an invitation");
        assert_eq!(envelope["client_message_id"], 0);
        GroupInvitation::decode(unb64(&envelope["content"]).as_slice()).expect("an invitation")
    }

    pub async fn join(&mut self) {
        let invitation = self.invitation().await;
        assert_eq!(invitation.group_id, &self.group.as_bytes()[..]);
        let tree = self.tree(invitation.epoch).await;
        self.run(|engine| engine.join(&invitation.welcome, &tree, true).map(drop)).expect("it joins");
        self.cursor = invitation.seq;
    }

    pub async fn tree(&self, epoch: u64) -> Vec<u8> {
        let url = format!("{}{}", self.device.base(), self.path(&format!("/trees/{epoch}")));
        let answer = sealpost::testing::http().expect("a client").get(url).bearer_auth(&self.device.credential).send().await;
        let answer = answer.expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK);
        answer.bytes().await.expect("a tree").to_vec()
    }

    pub fn encrypt(&mut self, text: &[u8]) -> (u64, Bytes) {
        self.in_group(|group, engine| Ok((group.epoch(), group.encrypt(engine, text)?.into()))).expect("a member writes")
    }

    pub fn next_send(&mut self, text: &[u8]) -> stream::GroupSend {
        let (epoch, content) = self.encrypt(text);
        let id = self.next_id;
        self.next_id += 1;
        let group_id = Bytes::copy_from_slice(self.group.as_bytes());
        stream::GroupSend { request_id: id, group_id, client_message_id: id, epoch, content }
    }

    pub async fn post(&self, send: &stream::GroupSend) -> (StatusCode, Value) {
        let body = json!({ "client_message_id": send.client_message_id, "epoch": send.epoch, "content": b64(&send.content) });
        self.call(Method::POST, &self.path("/messages"), Some(body)).await
    }

    pub async fn page(&self, after: u64, limit: usize) -> Value {
        let (status, page) = self.call(Method::GET, &self.path(&format!("/items?after={after}&limit={limit}")), None).await;
        assert_eq!(status, StatusCode::OK, "{page}");
        page
    }

    /// Takes in what came since, by pages; what was read.
    pub async fn catch_up(&mut self, limit: usize) -> Vec<Vec<u8>> {
        let mut read = Vec::new();
        loop {
            let page = self.page(self.cursor, limit).await;
            let items = page["items"].as_array().expect("items");
            for item in items {
                assert_eq!(item["after"], self.cursor, "no hole");
                self.cursor = item["seq"].as_u64().expect("a seq");
                let content = unb64(&item["content"]);
                if !content.is_empty()
                    && let Received::Message { content, .. } =
                        self.in_group(|group, engine| group.receive(engine, &content)).expect("it is taken in")
                {
                    read.push(content.to_vec());
                }
            }
            if self.cursor >= page["head"].as_u64().expect("a head") {
                return read;
            }
        }
    }

    /// What all members of an epoch have in common.
    pub fn view(&mut self) -> (u64, Vec<u8>, Vec<u8>) {
        self.in_group(|group, _| Ok((group.epoch(), group.tree_hash(), group.authenticator()))).expect("a group")
    }
}

pub fn follow_frame(group: GroupId) -> client_frame::Frame {
    client_frame::Frame::GroupFollow(stream::GroupFollow { group_id: Bytes::copy_from_slice(group.as_bytes()), stop: false })
}

pub async fn follow(stream: &mut RawStream, group: GroupId) -> GroupHead {
    stream.frames(vec![follow_frame(group)]).await.expect("sent");
    stream.find(|frame| if let Frame::GroupHead(head) = frame { Some(head) } else { None }).await.expect("an answer")
}

pub async fn item(stream: &mut RawStream) -> GroupItem {
    stream.find(|frame| if let Frame::GroupItem(item) = frame { Some(item) } else { None }).await.expect("an item")
}
