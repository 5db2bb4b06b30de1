//! States on the log, and what ends.

use std::collections::BTreeSet;

use sealpost::ids::{Generation, Offset};
use sealpost::mls::public::Public;
use sealpost::projector::groups::saved::State;
use sealpost::projector::groups::worker::Looks;
use sealpost::store::groups::GroupWrite;

use super::*;

const DAY: u64 = 24 * 3600 * 1000;
const QUICK: Looks = Looks { first: Duration::from_millis(20), expiry: Duration::from_millis(50), states: Duration::from_millis(50) };

/// A rig whose projector looks all the time at what the clock did.
fn watchful() -> Result<Rig> {
    let mut rig = Rig::new()?;
    rig.looks = QUICK;
    Ok(rig)
}

fn of_groups(rig: &Rig) -> TopicPartition {
    TopicPartition { topic: Topic::Groups, partition: Partition::of_group(&GROUP, rig.log.partitions(Topic::Groups)) }
}

const fn offset(seq: Seq) -> Offset {
    Offset(seq.0 - 1)
}

/// The payloads of the states on the log.
async fn states(rig: &Rig) -> Result<Vec<(Seq, bytes::Bytes)>> {
    let (mut at, _) = rig.log.bounds(of_groups(rig)).await?;
    let mut found = Vec::new();
    loop {
        let records = rig.log.read(of_groups(rig), at, 4 << 20).await?;
        let Some(last) = records.last() else { return Ok(found) };
        at = last.offset.next();
        for record in &records {
            if matches!(event::decode::<GroupEvent<'_>>(&record.payload)?.body, GroupEventBody::State { .. }) {
                found.push((Seq::at(Generation(0), record.offset), record.payload.clone()));
            }
        }
    }
}

/// A view made from the log behind this position.
async fn view_from(rig: &Rig, from: Offset) -> Result<(tempfile::TempDir, Arc<EmbeddedStore>)> {
    let dir = tempfile::tempdir()?;
    let fresh = EmbeddedStore::open(dir.path(), StoreOptions::default())?;
    let position = Some((of_groups(rig).partition, from));
    fresh.write_groups(GroupWrite { position, ..GroupWrite::default() }).await?;
    let (worker, _) = Worker::new(rig.parts(&fresh));
    worker.shadow().catch_up().await?;
    Ok((dir, fresh))
}

/// What two views must agree on, of which one has no items up to `from`.
fn behind(mut view: View, from: Seq) -> View {
    let head = view.head.as_mut().expect("a group");
    head.expired_to = head.expired_to.max(from);
    view.items.retain(|item| item.seq > from);
    let epoch = head.epoch as usize;
    // Older epochs' trees are of items that are not there either.
    view.trees.drain(..epoch.min(view.trees.len().saturating_sub(1)));
    view
}

fn public(view: &View) -> Result<Public> {
    let head = view.head.as_ref().context("a group")?;
    Ok(State::decode(GROUP, view.snapshot.as_ref().context("a snapshot")?, head.applied, &SystemRandom)?.public)
}

/// Members do something, a day goes by and they do something again: the projector says a state, and this is its position.
async fn next_state(rig: &Rig, device: &mut Device) -> Result<Seq> {
    rig.clock.advance(limits::GROUP_STATE_ACTIVE_MS);
    let before = rig.head().await?.stated_at;
    assert!(is_done(&device.write(rig, b"a new day").await?));
    rig.until("a state is said", |head, _| head.stated_at > before).await?;
    Ok(rig.head().await?.stated_at)
}

#[tokio::test]
async fn a_log_without_the_creation_gives_the_same_group() -> Result<()> {
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 5).await?;
    assert!(is_done(&devices[1].write(&rig, b"one").await?));
    assert!(states(&rig).await?.is_empty(), "its creation is fresh");
    let before = rig.items().await?.last().context("an item")?.seq;
    let state = next_state(&rig, &mut devices[0]).await?;
    assert_eq!(states(&rig).await?.len(), 1);
    // Once said it is not said again; and the group goes on.
    assert!(is_done(&devices[2].write(&rig, b"two").await?));
    assert!(is_done(&devices[1].commit(&rig, &Change::default()).await?));
    rig.append(GroupEventBody::DevicesGone { devices: vec![devices[4].address] }, None).await?;
    rig.until("it is proposed", |_, items| items.last().is_some_and(|item| item.sender.is_none())).await?;
    let mut new = Device::new(9);
    let package = new.key_package();
    assert!(is_done(&devices[0].commit(&rig, &Change { add: vec![(new.address, &package)], ..Change::default() }).await?));
    new.join(&rig).await?;
    devices.push(new);
    let leave = {
        devices[3].catch_up(&rig).await?;
        devices[3].in_group(|group, engine| group.leave(engine))?
    };
    assert!(is_done(&rig.submit(GroupEventBody::Proposal { by: devices[3].address, proposal: &leave }).await?));
    assert_eq!(states(&rig).await?.len(), 1);
    rig.stop().await?;
    let everybody = accounts(&devices);
    let live = Rig::view(&rig.store, &everybody).await?;
    // The log forgets everything before the day's first message.
    rig.log.truncate_before(of_groups(&rig), offset(before).next()).await?;
    let (_dir, fresh) = view_from(&rig, Offset(0)).await?;
    let rebuilt = Rig::view(&fresh, &everybody).await?;
    let begins = rebuilt.head.as_ref().context("the group is known")?.expired_to;
    assert!(begins > before && begins < state, "{begins:?}");
    let (one, two) = (public(&live)?, public(&rebuilt)?);
    assert_eq!((one.epoch(), one.tree_hash()), (two.epoch(), two.tree_hash()));
    assert_eq!(one.roster()?.leaves, two.roster()?.leaves);
    let marks = |store: Arc<EmbeddedStore>, devices: Vec<DeviceAddr>| async move { store.group_marks(GROUP, devices).await };
    let roster: Vec<DeviceAddr> = rebuilt.roster.as_ref().context("a roster")?.devices.clone();
    assert_eq!(marks(rig.store.clone(), roster.clone()).await?, marks(fresh.clone(), roster).await?);
    assert_eq!(behind(rebuilt, begins), behind(live, begins));
    // It goes on there: a commit takes up what was proposed, and everybody comes along.
    rig.store = fresh;
    rig.start();
    let verdict = devices[0].commit(&rig, &Change::default()).await?;
    assert!(is_done(&verdict), "{verdict:?}");
    assert_eq!(rig.store.group_roster(GROUP).await?.context("a roster")?.devices.len(), 4);
    let view = devices[0].view();
    for n in [1, 2, 5] {
        devices[n].catch_up(&rig).await?;
        assert_eq!(devices[n].view(), view, "{n}");
    }
    rig.stop().await
}

#[tokio::test]
async fn a_state_changes_nothing_for_who_knows_the_group() -> Result<()> {
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 3).await?;
    let first = next_state(&rig, &mut devices[0]).await?;
    let payload = states(&rig).await?.pop().context("a state")?.1;
    assert!(is_done(&devices[1].commit(&rig, &Change::default()).await?));
    assert!(is_done(&devices[1].write(&rig, b"later").await?));
    // Another projector, which lost the partition without knowing, says what it had; also when the group has moved on.
    for _ in 0..2 {
        rig.log.append(of_groups(&rig), payload.clone()).await?;
    }
    assert!(is_done(&devices[2].write(&rig, b"and on").await?));
    let head = rig.head().await?;
    assert!(head.epoch == 2 && head.stated_at > first, "{head:?}");
    // Parts that do not belong together, and one that is too far from what it holds.
    let state = |next, part, parts| GroupEventBody::State { next, applied: Seq::MAX, epoch: u64::MAX, part, parts, bytes: b"x" };
    for (next, part, parts) in [(first, 1, 2), (first, 0, 1), (Seq::MAX, 0, 1), (Seq::ZERO, 0, 1), (first, 0, 0), (first, 9, 10)] {
        rig.append(state(next, part, parts), None).await?;
    }
    assert!(is_done(&devices[0].write(&rig, b"still here").await?));
    assert_eq!(rig.head().await?.epoch, 2);
    for device in &mut devices {
        device.catch_up(&rig).await?;
    }
    let everybody = accounts(&devices);
    rig.check_rebuild(&everybody).await?;
    // Wherever a view begins, it is the same once it met a state.
    let live = Rig::view(&rig.store, &everybody).await?;
    for (at, _) in states(&rig).await?.into_iter().take(3) {
        let (_dir, fresh) = view_from(&rig, offset(at)).await?;
        let rebuilt = Rig::view(&fresh, &everybody).await?;
        let begins = rebuilt.head.as_ref().context("known")?.expired_to;
        assert_eq!(behind(rebuilt, begins), behind(live.clone(), begins), "{at:?}");
    }
    Ok(())
}

/// The log forgot what a projector had not applied yet: commits are missing in its view, until it meets a state.
#[tokio::test]
async fn a_state_repairs_a_view_that_missed_something() -> Result<()> {
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 3).await?;
    assert!(is_done(&devices[0].write(&rig, b"before").await?));
    let (_dir, late) = view_from(&rig, Offset(0)).await?;
    let verdict = devices[1].commit(&rig, &Change::default()).await?;
    let GroupVerdict::Done { seq: missed, .. } = verdict else { panic!("{verdict:?}") };
    devices[0].catch_up(&rig).await?;
    next_state(&rig, &mut devices[0]).await?;
    assert!(is_done(&devices[0].commit(&rig, &Change::default()).await?));
    rig.stop().await?;
    let everybody = accounts(&devices);
    let live = Rig::view(&rig.store, &everybody).await?;
    late.write_groups(GroupWrite { position: Some((of_groups(&rig).partition, offset(missed).next())), ..GroupWrite::default() }).await?;
    let (worker, _) = Worker::new(rig.parts(&late));
    worker.shadow().catch_up().await?;
    let repaired = Rig::view(&late, &everybody).await?;
    let begins = repaired.head.as_ref().context("known")?.expired_to;
    assert!(begins > missed);
    assert_eq!(behind(repaired, begins), behind(live, begins));
    Ok(())
}

/// A group in which nothing happens; then its items expire, it is closed, and nothing is left of it.
#[tokio::test]
async fn what_time_does_to_a_group() -> Result<()> {
    let mut rig = watchful()?;
    rig.crash().await;
    let mut devices = group_of(&rig, 3).await?;
    let GroupVerdict::Done { seq: last, .. } = devices[0].write(&rig, b"the last for long").await? else { panic!("accepted") };
    let mut stated = rig.head().await?.stated_at;
    assert!(stated < last);
    for _ in 0..3 {
        rig.clock.advance(limits::GROUP_STATE_IDLE_MS);
        rig.until("its state is said again", |head, _| head.stated_at > stated).await?;
        stated = rig.head().await?.stated_at;
    }
    assert_eq!(states(&rig).await?.len(), 3);
    // The hourly look: items go after thirty days, and no earlier.
    rig.clock.advance(9 * DAY - 1);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(rig.head().await?.expired_to, Seq::ZERO);
    rig.clock.advance(2);
    rig.until("its items expired", |head, items| head.expired_to == last && items.is_empty()).await?;
    assert!(is_done(&devices[1].write(&rig, b"again").await?));
    assert!(is_done(&rig.submit(GroupEventBody::Closed { by: devices[0].address }).await?));
    rig.clock.advance(limits::ENVELOPE_TTL_MS - 1);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(rig.head().await?.closed && rig.items().await?.len() == 2, "who was away can still read that it ended");
    let said = states(&rig).await?.len();
    rig.clock.advance(2);
    let wait = async {
        while rig.store.group(GROUP).await?.is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, wait).await.context("it is removed")??;
    assert_eq!(states(&rig).await?.len(), said, "nobody says the state of a closed group");
    let everybody = accounts(&devices);
    let view = Rig::view(&rig.store, &everybody).await?;
    assert_eq!((view.roster, view.items, view.members), (None, vec![], vec![vec![]; 3]));
    rig.check_rebuild(&everybody).await?;
    // The id is free: what is refused is a device whose lifetime, which openmls takes from the machine's clock, is over by the log's.
    rig.start();
    assert!(matches!(Device::new(7).create(&rig).await?, GroupVerdict::Invalid(_)));
    rig.check_rebuild(&everybody).await
}

#[tokio::test]
async fn a_group_that_everybody_left_ends() -> Result<()> {
    // The one device is gone, and the other two asked to leave.
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 3).await?;
    rig.append(GroupEventBody::DevicesGone { devices: vec![devices[0].address] }, None).await?;
    for n in [1, 2] {
        assert!(!rig.head().await?.closed);
        devices[n].catch_up(&rig).await?;
        let leave = devices[n].in_group(|group, engine| group.leave(engine))?;
        assert!(is_done(&rig.submit(GroupEventBody::Proposal { by: devices[n].address, proposal: &leave }).await?));
    }
    let ended = |head: &GroupHead, items: &[GroupItem]| {
        head.closed && items.last().is_some_and(|item| item.kind == GroupItemKind::Closed && item.sender.is_none())
    };
    rig.until("it ends", ended).await?;
    rig.check_rebuild(&accounts(&devices)).await?;
    // All accounts are deleted.
    let mut rig = Rig::new()?;
    let devices = group_of(&rig, 2).await?;
    rig.append(GroupEventBody::DevicesGone { devices: devices.iter().map(|device| device.address).collect() }, None).await?;
    rig.until("it ends", ended).await?;
    let distinct: BTreeSet<Seq> = rig.items().await?.iter().map(|item| item.seq).collect();
    assert_eq!(distinct.len(), 3, "created, added, closed");
    rig.check_rebuild(&accounts(&devices)).await
}
