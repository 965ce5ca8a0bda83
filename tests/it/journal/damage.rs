//! Flipped bits in the file: named in their place, never handed out, and nothing is silently missing.

use super::*;
use twinspan::message::Envelope;

const MARK: &[u8] = b"twinspan-marked-payload-";

fn marked(n: usize) -> Message {
    let mut message = numbered(n);
    message.payload = [MARK, format!("{n:04}").as_bytes()].concat().into();
    message
}

type Read = Vec<Result<Arc<Envelope>, LaneError>>;

async fn read_damaged(lane: &Journal, topic: &Topic) -> Result<Read, LaneError> {
    let mut reader = lane.read(&for_ever(), topic, Start::Earliest).await?;
    let mut all = Vec::new();
    while let Some(batch) = soon(reader.next()).await? {
        all.extend(batch);
    }
    Ok(all)
}

/// How many sequence numbers an error stands for: its place is one position, or one to another.
fn stands_for(error: &LaneError) -> usize {
    let LaneError::Corrupt { place, .. } = error else { panic!("{error:?}") };
    let entry = |place: &str| place.parse::<Place>().unwrap().entry as usize;
    place.split_once(" to ").map_or(1, |(first, last)| entry(last) - entry(first) + 1)
}

#[tokio::test]
async fn a_record_with_a_flipped_bit_is_named_in_its_place_and_reading_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (route, topic) = (for_ever(), topic("a"));
    let lane = open(dir.path()).unwrap();
    append_all(&lane, &route, &topic, (0..100).map(marked).collect()).await;
    lane.close().await;
    let file = dir.path().join("journal.redb");
    let mut bytes = fs::read(&file).unwrap();
    let mut flipped = 0;
    for n in [17, 18, 63, 99] {
        let payload = marked(n).payload;
        for at in 0..bytes.len() - payload.len() {
            if bytes[at..].starts_with(&payload) {
                bytes[at + 3] ^= 4;
                flipped += 1;
            }
        }
    }
    assert!(flipped >= 4);
    fs::write(&file, bytes).unwrap();

    let metrics = Arc::new(Metrics::new());
    let lane = Journal::open(dir.path(), policy(Retention::default()), SOON, metrics.clone()).unwrap();
    let read = read_damaged(&lane, &topic).await.unwrap();
    assert_eq!(read.len(), 100);
    for (n, found) in read.iter().enumerate() {
        match found {
            Ok(envelope) => assert_eq!(envelope.message.payload, marked(n).payload),
            Err(LaneError::Corrupt { topic: of, place }) => {
                assert!([17, 18, 63, 99].contains(&n), "{n}");
                assert_eq!((of, place.parse::<Place>().unwrap().entry), (&topic, n as u64 + 1));
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(read.iter().filter(|found| found.is_err()).count(), 4);
    let dropped = "twinspan_dropped_total{lane=\"durable\",reason=\"corrupt\",route=\"all\"} 4";
    assert!(metrics.render().contains(dropped), "{}", metrics.render());

    // A group is told in the same way, and goes on behind it, for good.
    let member = lane.join(&route, &topic, shared("g", Start::Earliest, 1000)).await.unwrap();
    let (mut whole, mut corrupt) = (Vec::new(), 0);
    while whole.len() + corrupt < 100 {
        for handed in soon(member.next()).await.unwrap() {
            match handed {
                Ok(handed) => whole.push(handed.tag),
                Err(error) => corrupt += stands_for(&error),
            }
        }
    }
    assert_eq!((whole.len(), corrupt), (96, 4));
    member.ack(whole).await.unwrap();
    until("the end of it", async || backlog(&*lane, &route, &topic).await == 0).await;
}

/// A crash must not turn one bad bit into the loss of the log: redb would check every page then, and give up.
#[tokio::test]
async fn a_flipped_bit_does_not_keep_a_log_from_being_opened_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let (route, topic) = (for_ever(), topic("a"));
    let lane = open(dir.path()).unwrap();
    append_all(&lane, &route, &topic, (0..100).map(marked).collect()).await;
    // What is on disk now is what a SIGKILL would leave.
    let mut bytes = fs::read(dir.path().join("journal.redb")).unwrap();
    let payload = marked(40).payload;
    for at in 0..bytes.len() - payload.len() {
        if bytes[at..].starts_with(&payload) {
            bytes[at] ^= 1;
        }
    }
    let after = tempfile::tempdir().unwrap();
    fs::write(after.path().join("journal.redb"), bytes).unwrap();
    let lane = open(after.path()).unwrap();
    let read = read_damaged(&lane, &topic).await.unwrap();
    let lost: Vec<_> = (0..read.len()).filter(|n| read[*n].is_err()).collect();
    assert_eq!((read.len(), lost), (100, vec![40]));
}

/// Whatever bit of the file flips: the log says so when it is opened or in the place of what it lost, or nothing was
/// lost. It never hands out anything else than was stored, and never less without a word.
#[tokio::test]
async fn no_flipped_bit_of_the_file_goes_unnoticed() {
    const MESSAGES: usize = 120;
    // Some of the bytes each time, others the next time.
    const STEP: usize = 197;
    let dir = tempfile::tempdir().unwrap();
    let (route, topic) = (for_ever(), topic("a"));
    let lane = open(dir.path()).unwrap();
    append_all(&lane, &route, &topic, (0..MESSAGES).map(marked).collect()).await;
    drop(lane.join(&route, &topic, shared("g", Start::Earliest, 10)).await.unwrap());
    lane.close().await;
    let whole = fs::read(dir.path().join("journal.redb")).unwrap();
    // Pages that hold nothing need no flipping.
    let used: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] != 0).collect();
    let (mut refused, mut named, mut harmless) = (0, 0, 0);
    // Whichever these are, the file's first byte is among them, which is refused, and one of a message, which is named.
    let payload = marked(40).payload;
    let message = whole.windows(payload.len()).position(|bytes| *bytes == *payload).unwrap();
    let sample = used.into_iter().skip(fastrand::usize(..STEP)).step_by(STEP);
    for at in sample.chain([0, message]) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << fastrand::u32(..8);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("journal.redb"), bytes).unwrap();
        let lane = match open(dir.path()) {
            Ok(lane) => lane,
            Err(_) => {
                refused += 1;
                continue;
            }
        };
        if let Ok(read) = read_damaged(&lane, &topic).await {
            let mut n = 0;
            for found in &read {
                match found {
                    Ok(envelope) => {
                        assert_eq!(envelope.message.payload, marked(n).payload, "byte {at}");
                        n += 1;
                    }
                    Err(error) => n += stands_for(error),
                }
            }
            assert_eq!(n, MESSAGES, "byte {at}");
            if read.iter().any(Result::is_err) { named += 1 } else { harmless += 1 }
        } else {
            named += 1;
        }
        lane.close().await;
    }
    println!("{refused} refused, {named} named, {harmless} harmless");
    assert!(named > 0 && refused > 0);
}
