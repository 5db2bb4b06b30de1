//! Delivery over real sockets, frame by frame: what `schemas/stream.proto` and the HTTP inbox promise.

use std::time::Duration;

use prost::Message as _;
use reqwest::{Method, StatusCode};
use sealpost::limits;
use sealpost::testing::{Broker, RawDevice, RawStream, send_frame};
use sealpost::wire::stream::{self, CloseReason, Code, ReceiptKind, client_frame::Frame as ClientSide, server_frame::Frame};
use serde_json::json;
use tokio_tungstenite::tungstenite;

type Test = anyhow::Result<()>;

async fn pair(broker: &Broker) -> anyhow::Result<(RawDevice, RawDevice)> {
    Ok((broker.device("alice@socialink").await?, broker.device("bob@vignette").await?))
}

async fn accepted(stream: &mut RawStream, id: u64) -> Test {
    let result = stream.result(id).await?;
    anyhow::ensure!(result.code() == Code::Ok, "{result:?}");
    Ok(())
}

async fn delivered(stream: &mut RawStream, from: &RawDevice) -> anyhow::Result<Vec<(u64, u64)>> {
    let receipt = stream.find(|frame| if let Frame::Receipt(receipt) = frame { Some(receipt) } else { None }).await?;
    stream.ack(receipt.seq).await?;
    let entry = receipt.entries.first().expect("an entry");
    assert_eq!(entry.account, &from.addr.account.as_bytes()[..]);
    assert_eq!((entry.device, entry.kind()), (from.addr.device.get().into(), ReceiptKind::Delivered));
    Ok(entry.client_message_ids.iter().map(|range| (range.first, range.last)).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_pushed_acknowledged_and_reported() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let (mut a, mut b) = (alice.connect().await?, bob.connect().await?);
    assert_eq!(b.hello.cursor, 0);
    assert!(b.backlog().await?.is_empty());
    a.send(&[&bob], 1, b"first").await?;
    a.send(&[&bob], 2, b"second").await?;
    accepted(&mut a, 1).await?;
    let (first, second) = (b.envelope().await?, b.envelope().await?);
    assert_eq!((first.content.as_ref(), second.content.as_ref()), (&b"first"[..], &b"second"[..]));
    assert_eq!((first.sender_account.as_ref(), first.sender_device), (&alice.addr.account.as_bytes()[..], 1));
    assert_eq!((first.client_message_id, second.client_message_id, first.r#type), (1, 2, 2));
    assert!(first.seq < second.seq && first.accepted_ms > 1_700_000_000_000);
    b.ack(second.seq).await?;
    assert_eq!(delivered(&mut a, &bob).await?, [(1, 2)]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offline_device_gets_its_backlog_in_order_then_queue_empty_then_live() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let mut a = alice.connect().await?;
    for id in 1..=300 {
        a.send(&[&bob], id, &id.to_be_bytes()).await?;
        if id % 100 == 0 {
            accepted(&mut a, id).await?;
        }
    }
    let mut b = bob.connect().await?;
    let backlog = b.backlog().await?;
    assert!(backlog.iter().map(|envelope| envelope.client_message_id).eq(1..=300));
    assert!(backlog.is_sorted_by_key(|envelope| envelope.seq));
    a.send(&[&bob], 301, b"live").await?;
    assert_eq!(b.envelope().await?.content.as_ref(), b"live");
    // Not acknowledged: all of it comes again. Acknowledged in part: the rest does.
    drop(b);
    let mut b = bob.connect().await?;
    assert_eq!(b.backlog().await?.len(), 301);
    b.ack(backlog[199].seq).await?;
    assert_eq!(delivered(&mut a, &bob).await?, [(1, 200)]);
    drop(b);
    let mut b = bob.connect().await?;
    assert_eq!(b.hello.cursor, backlog[199].seq);
    let rest = b.backlog().await?;
    assert!(rest.iter().map(|envelope| envelope.client_message_id).eq(201..=301));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_message_id_is_accepted_again_and_delivered_once() -> Test {
    let mut broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let mut a = alice.connect().await?;
    for round in 0..3 {
        a.send(&[&bob], 1, b"once").await?;
        accepted(&mut a, 1).await?;
        let (status, _) = alice.post(&[&bob], 1, b"once").await?;
        assert_eq!(status, StatusCode::OK, "round {round}");
    }
    broker.restart().await?;
    let (status, _) = alice.post(&[&bob], 1, b"once").await?;
    assert_eq!(status, StatusCode::OK, "after a restart");
    alice.post(&[&bob], 2, b"next").await?;
    let mut b = bob.connect().await?;
    let contents: Vec<_> = b.backlog().await?.into_iter().map(|envelope| envelope.content).collect();
    assert_eq!(contents, [&b"once"[..], &b"next"[..]]);
    Ok(())
}

/// Marks outlive devices: without a new beginning, its first messages would be answered OK and dropped as repeats.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_number_that_is_given_again_has_no_predecessor() -> Test {
    let mut broker = Broker::start().await?;
    let bob = broker.device("bob@vignette").await?;
    let mut last = broker.device("alice@socialink").await?;
    for id in 1..=3 {
        assert_eq!(last.post(&[&bob], id, b"of the first").await?.0, StatusCode::OK);
    }
    for number in 2..=128 {
        let next = broker.device("alice@socialink").await?;
        assert_eq!(u32::from(next.addr.device.get()), (number - 1) % 127 + 1);
        assert_eq!(next.first_message_id == 1, number <= 127, "{number}: {}", next.first_message_id);
        let (status, _) = last.call(Method::DELETE, &format!("/v1/devices/{}", last.addr.device.get()), None).await?;
        assert_eq!(status, StatusCode::NO_CONTENT);
        last = next;
    }
    let alice = last;
    assert!(alice.first_message_id > 1_700_000_000_000, "the registration's time");
    for id in [1, 3, 4, alice.first_message_id - 1] {
        let (status, answer) = alice.post(&[&bob], id, b"too low").await?;
        assert_eq!((status, &answer["code"]), (StatusCode::BAD_REQUEST, &json!("bad_request")), "{answer}");
        assert!(answer["message"].as_str().is_some_and(|text| text.contains("first_message_id")), "{answer}");
        let mut a = alice.connect().await?;
        a.send(&[&bob], id, b"too low").await?;
        let result = a.result(id).await?;
        assert!(result.code() == Code::BadRequest && result.message.contains("first_message_id"), "{result:?}");
    }
    // It is kept with the account.
    broker.restart().await?;
    assert_eq!(alice.post(&[&bob], 1, b"too low").await?.0, StatusCode::BAD_REQUEST);
    for _ in 0..2 {
        assert_eq!(alice.post(&[&bob], alice.first_message_id, b"of the second").await?.0, StatusCode::OK);
    }
    let mut a = alice.connect().await?;
    a.send(&[&bob], alice.first_message_id, b"of the second").await?;
    accepted(&mut a, alice.first_message_id).await?;
    let backlog = bob.connect().await?.backlog().await?;
    let contents: Vec<_> = backlog.iter().map(|envelope| envelope.content.as_ref()).collect();
    assert_eq!(contents, [&b"of the first"[..], b"of the first", b"of the first", b"of the second"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_id_too_far_behind_is_refused_not_dropped() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let mut a = alice.connect().await?;
    a.send(&[&bob], limits::MESSAGE_ID_WINDOW + 10, b"high").await?;
    accepted(&mut a, limits::MESSAGE_ID_WINDOW + 10).await?;
    a.send(&[&bob], 11, b"the last one inside").await?;
    accepted(&mut a, 11).await?;
    a.send(&[&bob], 10, b"one past it").await?;
    assert_eq!(a.result(10).await?.code(), Code::StaleMessageId);
    let (status, answer) = alice.post(&[&bob], 10, b"one past it").await?;
    assert_eq!((status, &answer["code"]), (StatusCode::CONFLICT, &json!("stale_message_id")));
    a.send(&[&bob], 0, b"none").await?;
    assert_eq!(a.result(0).await?.code(), Code::BadRequest);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_devices_are_answered_with_lists_and_nothing_is_accepted_in_part() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let second = broker.device("bob@vignette").await?;
    assert_eq!(second.addr.account, bob.addr.account, "the same person");
    let mut a = alice.connect().await?;
    a.send(&[&bob], 1, b"only one of two").await?;
    let result = a.result(1).await?;
    assert_eq!((result.code(), &result.missing_devices[..], result.extra_devices.len()), (Code::DeviceMismatch, &[2][..], 0));
    let mut send = send_frame(&[&bob, &second], 1, b"one too many");
    send.envelopes.push(stream::OutgoingEnvelope { device_id: 9, ..send.envelopes[0].clone() });
    a.frames(vec![ClientSide::Send(send)]).await?;
    let result = a.result(1).await?;
    assert_eq!((result.code(), &result.extra_devices[..]), (Code::DeviceMismatch, &[9][..]));
    let mut stranger = second.clone();
    stranger.registration_id += 1;
    a.send(&[&bob, &stranger], 1, b"an older installation").await?;
    let result = a.result(1).await?;
    assert_eq!((result.code(), &result.stale_devices[..]), (Code::StaleDevices, &[2][..]));
    let (status, answer) = alice.post(&[&bob, &stranger], 1, b"the same by HTTP").await?;
    assert_eq!((status, &answer["code"], &answer["stale_devices"]), (StatusCode::GONE, &json!("stale_devices"), &json!([2])));
    let (status, answer) = alice.post(&[&bob], 1, b"the same by HTTP").await?;
    assert_eq!((status, &answer["missing_devices"]), (StatusCode::CONFLICT, &json!([2])));
    assert!(bob.connect().await?.backlog().await?.is_empty());
    a.send(&[&bob, &second], 1, b"right").await?;
    accepted(&mut a, 1).await?;
    for device in [&bob, &second] {
        assert_eq!(device.connect().await?.backlog().await?.len(), 1);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ones_own_other_devices_get_their_copy_the_same_way() -> Test {
    let broker = Broker::start().await?;
    let phone = broker.device("alice@socialink").await?;
    let tablet = broker.device("alice@socialink").await?;
    let mut p = phone.connect().await?;
    p.send(&[&phone, &tablet], 1, b"to myself as well").await?;
    assert_eq!(p.result(1).await?.extra_devices, [1]);
    p.send(&[&tablet], 1, b"transcript").await?;
    accepted(&mut p, 1).await?;
    assert_eq!(tablet.connect().await?.backlog().await?.len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newer_stream_wins_and_the_older_is_told() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let mut older = bob.connect().await?;
    let mut newer = bob.connect().await?;
    assert_eq!(older.closed().await?, Some(CloseReason::Replaced));
    newer.backlog().await?;
    alice.post(&[&bob], 1, b"to the newer").await?;
    assert_eq!(newer.envelope().await?.content.as_ref(), b"to the newer");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ephemeral_messages_reach_attached_devices_or_nobody() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let mut a = alice.connect().await?;
    let typing = |id| ClientSide::Send(stream::Send { ephemeral: true, ..send_frame(&[&bob], id, b"typing") });
    a.frames(vec![typing(1)]).await?;
    accepted(&mut a, 1).await?;
    let mut b = bob.connect().await?;
    assert!(b.backlog().await?.is_empty(), "nobody was there");
    a.frames(vec![typing(2)]).await?;
    let envelope = b.envelope().await?;
    assert_eq!((envelope.seq, envelope.ephemeral, envelope.content.as_ref()), (0, true, &b"typing"[..]));
    drop(b);
    assert!(bob.connect().await?.backlog().await?.is_empty(), "never stored");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn blocked_unknown_and_deleted_recipients_have_their_answers() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let mut a = alice.connect().await?;
    let (status, _) = bob.call(Method::PUT, &format!("/v1/blocks/{}", alice.addr.account), None).await?;
    assert_eq!(status, StatusCode::NO_CONTENT);
    a.send(&[&bob], 1, b"blocked").await?;
    assert_eq!(a.result(1).await?.code(), Code::Blocked);
    bob.call(Method::DELETE, &format!("/v1/blocks/{}", alice.addr.account), None).await?;
    a.send(&[&bob], 1, b"not any more").await?;
    accepted(&mut a, 1).await?;

    let mut nobody = bob.clone();
    nobody.addr.account = sealpost::ids::AccountId::from_bytes([7; 16]);
    a.send(&[&nobody], 2, b"nobody").await?;
    assert_eq!(a.result(2).await?.code(), Code::NotFound);

    let mut b = bob.connect().await?;
    assert_eq!(b.backlog().await?.len(), 1);
    let (status, _) = bob.call(Method::DELETE, "/v1/account", None).await?;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert_eq!(b.closed().await?, Some(CloseReason::Revoked));
    a.send(&[&bob], 3, b"too late").await?;
    assert_eq!(a.result(3).await?.code(), Code::AccountDeleted);
    assert!(bob.connect().await.is_err(), "the credential is dead");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_device_loses_its_stream_at_once() -> Test {
    let broker = Broker::start().await?;
    let phone = broker.device("alice@socialink").await?;
    let tablet = broker.device("alice@socialink").await?;
    let mut t = tablet.connect().await?;
    let mut p = phone.connect().await?;
    let (status, _) = phone.call(Method::DELETE, "/v1/devices/2", None).await?;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert_eq!(t.closed().await?, Some(CloseReason::Revoked));
    p.find(|frame| matches!(frame, Frame::AccountChanged(_)).then_some(())).await?;
    assert!(tablet.connect().await.is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inbox_is_read_by_plain_http() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let (status, page) = bob.call(Method::GET, "/v1/inbox", None).await?;
    assert_eq!((status, &page["items"], &page["empty"]), (StatusCode::OK, &json!([]), &json!(true)));
    let waiting = {
        let bob = bob.clone();
        tokio::spawn(async move { bob.call(Method::GET, "/v1/inbox?wait_s=20", None).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    alice.post(&[&bob], 1, b"wakes the poll").await?;
    let (_, page) = tokio::time::timeout(Duration::from_secs(5), waiting).await???;
    assert_eq!(page["items"][0]["envelope"]["client_message_id"], json!(1));
    for id in 2..=5 {
        alice.post(&[&bob], id, b"more").await?;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (_, page) = bob.call(Method::GET, "/v1/inbox?limit=2", None).await?;
    assert_eq!((page["items"].as_array().map(Vec::len), &page["empty"]), (Some(2), &json!(false)));
    let seq = page["items"][1]["envelope"]["seq"].as_u64().expect("a seq");
    let (_, page) = bob.call(Method::GET, &format!("/v1/inbox?after={seq}"), None).await?;
    assert_eq!((page["items"].as_array().map(Vec::len), &page["empty"]), (Some(3), &json!(true)));
    let (status, _) = bob.call(Method::POST, "/v1/inbox/ack", Some(json!({ "seq": seq }))).await?;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let mut a = alice.connect().await?;
    assert_eq!(delivered(&mut a, &bob).await?, [(1, 2)]);
    let (status, answer) = bob.call(Method::POST, "/v1/inbox/ack", Some(json!({ "seq": 1u64 << 40 }))).await?;
    assert_eq!((status, &answer["code"]), (StatusCode::BAD_REQUEST, &json!("bad_request")));
    assert_eq!(bob.connect().await?.backlog().await?.len(), 3);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_break_the_protocol_are_closed_with_the_reason() -> Test {
    let broker = Broker::start().await?;
    let (alice, _) = pair(&broker).await?;
    for message in [
        tungstenite::Message::Text("hello".into()),
        tungstenite::Message::Binary(vec![0xff; 30].into()),
        tungstenite::Message::Binary(
            stream::ClientBatch { frames: vec![stream::ClientFrame { frame: Some(ClientSide::Ack(stream::Ack { seq: 1 << 40 })) }] }
                .encode_to_vec()
                .into(),
        ),
    ] {
        let mut a = alice.connect().await?;
        a.message(message.clone()).await?;
        assert_eq!(a.closed().await?, Some(CloseReason::ProtocolError), "{message:?}");
    }
    // A frame of a newer client is passed over.
    let mut a = alice.connect().await?;
    a.message(tungstenite::Message::Binary(vec![0x0a, 0x04, 0xf2, 0x07, 0x01, 0x41].into())).await?;
    a.backlog().await?;
    a.silent(Duration::from_millis(200)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn envelopes_are_capped_at_256_kib_each() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let mut a = alice.connect().await?;
    a.send(&[&bob], 1, &vec![7; limits::ENVELOPE_BYTES]).await?;
    accepted(&mut a, 1).await?;
    a.send(&[&bob], 2, &vec![7; limits::ENVELOPE_BYTES + 1]).await?;
    assert_eq!(a.result(2).await?.code(), Code::TooLarge);
    let (status, _) = alice.post(&[&bob], 2, &vec![7; limits::ENVELOPE_BYTES + 1]).await?;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    a.send(&[&bob], 2, b"").await?;
    assert_eq!(a.result(2).await?.code(), Code::BadRequest);
    assert_eq!(bob.connect().await?.backlog().await?[0].content.len(), limits::ENVELOPE_BYTES);
    Ok(())
}

/// Flow control pauses the feed, the session's queue overflows, and the stream catches up from the store: nothing missing, nothing twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_loses_its_live_feed_and_no_envelope() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let (mut a, mut b) = (alice.connect().await?, bob.connect().await?);
    b.backlog().await?;
    let content = vec![3; 32 * 1024];
    let total = 2 * (limits::UNACKED_BYTES + limits::SESSION_QUEUE_BYTES) as u64 / content.len() as u64;
    for id in 1..=total {
        a.send(&[&bob], id, &content).await?;
        if id % 32 == 0 {
            accepted(&mut a, id).await?;
        }
    }
    let mut got = Vec::new();
    while (got.len() as u64) < total {
        let envelope = b.envelope().await?;
        got.push(envelope.client_message_id);
        if got.len() % 16 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            b.ack(envelope.seq).await?;
        }
    }
    assert!(got.iter().copied().eq(1..=total), "in order, each once");
    let metrics = reqwest::get(format!("{}/metrics", broker.url())).await?.text().await?;
    let cuts = metrics.lines().find(|line| line.starts_with("sealpost_delivery_feed_cuts_total")).expect("the metric");
    assert!(!cuts.ends_with(" 0"), "the feed was cut: {cuts}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_broker_tells_its_streams_and_loses_nothing() -> Test {
    let mut broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let (mut a, mut b) = (alice.connect().await?, bob.connect().await?);
    b.backlog().await?;
    a.send(&[&bob], 1, b"before").await?;
    accepted(&mut a, 1).await?;
    let seq = b.envelope().await?.seq;
    b.ack(seq).await?;
    a.send(&[&bob], 2, b"not acknowledged").await?;
    accepted(&mut a, 2).await?;
    let closed = tokio::spawn(async move { b.closed().await });
    broker.restart().await?;
    assert_eq!(closed.await??, Some(CloseReason::Draining));
    let backlog = bob.connect().await?.backlog().await?;
    assert_eq!(backlog.iter().map(|envelope| envelope.client_message_id).collect::<Vec<_>>(), [2]);
    Ok(())
}
