//! A member of the group: real MLS, and what it has stored.

use super::*;

/// One device and what it has stored.
pub(super) struct Device {
    pub(super) address: DeviceAddr,
    pub(super) state: MemoryState,
    pub(super) random: SeededRandom,
    /// The last item that it took in.
    pub(super) cursor: Seq,
    pub(super) counter: u64,
}

impl Device {
    pub(super) fn new(byte: u8) -> Self {
        let address = DeviceAddr { account: account(byte), device: DeviceId::new(1).expect("a device number") };
        let mut state = MemoryState::default();
        state.commit([(StateKey::OwnAddress, Some(encode_address(address).into()))].into());
        Self { address, state, random: SeededRandom::new(u64::from(byte)), cursor: Seq::ZERO, counter: 0 }
    }

    pub(super) fn run<T>(&mut self, work: impl FnOnce(&Engine<'_, '_>) -> Result<T, Error>) -> Result<T, Error> {
        let tx = StateTx::new(&self.state);
        let engine = Engine::new(&tx, &self.random)?;
        let done = work(&engine);
        let (writes, _) = tx.finish();
        if done.is_ok() {
            self.state.commit(writes);
        }
        done
    }

    pub(super) fn in_group<T>(&mut self, work: impl FnOnce(&mut Group, &Engine<'_, '_>) -> Result<T, Error>) -> Result<T, Error> {
        self.run(|engine| work(&mut engine.load(GROUP)?.ok_or(Error::NotMember)?, engine))
    }

    pub(super) fn key_package(&mut self) -> Vec<u8> {
        self.run(|engine| engine.key_packages(1, SystemClock.now())).expect("a KeyPackage").remove(0)
    }

    pub(super) fn change(&mut self, change: &Change<'_>) -> Result<Outgoing, Error> {
        self.in_group(|group, engine| group.change(engine, change, SystemClock.now()))
    }

    pub(super) fn view(&mut self) -> (u64, Vec<u8>, Vec<u8>) {
        self.in_group(|group, _| Ok((group.epoch(), group.tree_hash(), group.authenticator()))).expect("a group")
    }

    /// Takes in what is behind its cursor; the messages that it read.
    pub(super) async fn catch_up(&mut self, rig: &Rig) -> Result<Vec<Vec<u8>>> {
        let mut read = Vec::new();
        for item in rig.store.group_items(GROUP, self.cursor, usize::MAX, usize::MAX).await? {
            self.cursor = item.seq;
            if matches!(item.kind, GroupItemKind::Created | GroupItemKind::Closed) {
                continue;
            }
            match self.in_group(|group, engine| group.receive(engine, &item.content)) {
                Ok(Received::Message { content, .. }) => read.push(content.to_vec()),
                Ok(_) | Err(Error::Past) => {}
                Err(error) if item.sender == Some(self.address) => tracing::debug!(%error, "its own"),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(read)
    }

    pub(super) async fn create(&mut self, rig: &Rig) -> Result<GroupVerdict> {
        let server = Some(external_sender(&rig.key.public()));
        let created = self.run(|engine| Ok(engine.create(GROUP, "Berge", server, SystemClock.now())?.1))?;
        rig.submit(GroupEventBody::Created { by: self.address, group_info: &created.group_info, tree: &created.tree }).await
    }

    pub(super) fn commit_body<'o>(&self, sent: &'o Outgoing) -> GroupEventBody<'o> {
        GroupEventBody::Commit { by: self.address, commit: &sent.commit, welcome: sent.welcome.as_deref(), group_info: &sent.group_info }
    }

    /// Commits a change and takes its verdict in.
    pub(super) async fn commit(&mut self, rig: &Rig, change: &Change<'_>) -> Result<GroupVerdict> {
        self.catch_up(rig).await?;
        let sent = self.change(change)?;
        let verdict = rig.submit(self.commit_body(&sent)).await?;
        match verdict {
            GroupVerdict::Done { seq, .. } => {
                self.in_group(|group, engine| group.accepted(engine).map(drop))?;
                self.cursor = seq;
            }
            _ => self.in_group(|group, engine| group.refused(engine))?,
        }
        Ok(verdict)
    }

    pub(super) async fn join(&mut self, rig: &Rig) -> Result<()> {
        let invitation = rig.invitations(self.address).await?.pop().context("it was invited")?;
        let tree = rig.store.group_tree(GROUP, invitation.epoch).await?.context("the tree is there")?;
        self.run(|engine| engine.join(&invitation.welcome, &tree, false).map(drop))?;
        self.cursor = Seq(invitation.seq);
        Ok(())
    }

    pub(super) async fn write(&mut self, rig: &Rig, text: &[u8]) -> Result<GroupVerdict> {
        self.counter += 1;
        self.write_as(rig, self.counter, text).await
    }

    pub(super) async fn write_as(&mut self, rig: &Rig, id: u64, text: &[u8]) -> Result<GroupVerdict> {
        let epoch = self.view().0;
        let content = self.in_group(|group, engine| group.encrypt(engine, text))?;
        let client_message_id = ClientMessageId(id);
        rig.submit(GroupEventBody::Message { by: self.address, client_message_id, epoch, content: &content }).await
    }
}
