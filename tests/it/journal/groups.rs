//! What is known of groups when the log comes back: after a restart, a power cut, an fsync that failed.

use twinspan::lane::contract::{Handed, Joining, Member};
use twinspan::message::{Draft, GroupMode};

use super::disk::Disk;
use super::*;

fn open_on(disk: &Arc<Disk>, dir: &Path) -> Arc<Journal> {
    let rules = policy(Retention::default());
    Journal::open_with(dir, rules, SOON, Arc::new(Metrics::new()), disk.opener()).unwrap()
}

async fn join(lane: &Journal, topic: &Topic, mode: GroupMode) -> Box<dyn Member> {
    let joining = Joining { group: "g".into(), mode, start: Start::Earliest, prefetch: 100 };
    soon(lane.join(&for_ever(), topic, joining)).await.unwrap()
}

async fn take(member: &dyn Member, count: usize) -> Vec<Handed> {
    let mut taken = Vec::new();
    while taken.len() < count {
        taken.extend(soon(member.next()).await.unwrap().into_iter().map(Result::unwrap));
    }
    taken
}

async fn is_quiet(member: &dyn Member) {
    let came = tokio::time::timeout(Duration::from_millis(300), member.next()).await;
    assert!(came.is_err(), "nothing should come, and this did: {came:?}");
}

fn handed_numbers(handed: &[Handed]) -> Vec<usize> {
    handed.iter().map(|handed| number(&handed.envelope)).collect()
}

async fn ack(member: &dyn Member, handed: &[Handed]) {
    member.ack(handed.iter().map(|handed| handed.tag).collect()).await.unwrap();
}

/// What a power cut leaves right now, opened.
fn after_power_cut(disk: &Disk) -> (tempfile::TempDir, Arc<Journal>) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("journal.redb"), disk.after_power_cut()).unwrap();
    let lane = open(dir.path()).unwrap();
    (dir, lane)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_takes_back_no_seek_and_no_deletion() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    disk.remembers();
    let (lane, route, topic) = (open_on(&disk, dir.path()), for_ever(), topic("a"));
    append_all(&lane, &route, &topic, (0..10).map(numbered).collect()).await;
    let member = join(&lane, &topic, GroupMode::Shared).await;
    ack(&*member, &take(&*member, 10).await).await;
    for last in [3, 8, 5] {
        lane.seek(&route, &topic, "g", Start::Last(last)).await.unwrap();
        let (_dir, after) = after_power_cut(&disk);
        let member = join(&after, &topic, GroupMode::Exclusive).await;
        let expected: Vec<_> = (10 - last as usize..10).collect();
        assert_eq!(handed_numbers(&take(&*member, expected.len()).await), expected);
        is_quiet(&*member).await;
        after.close().await;
    }
    drop(member);
    assert!(lane.delete_group(&route, &topic, "g").await.unwrap());
    let (_dir, after) = after_power_cut(&disk);
    assert_eq!(after.groups(&route, &topic).await.unwrap(), []);
    assert_eq!(numbers(&read(&*after, &route, &topic, Start::Earliest).await).len(), 10);
    after.close().await;
}

#[tokio::test]
async fn a_delayed_message_still_waits_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (lane, route, topic) = (open(dir.path()).unwrap(), for_ever(), topic("a"));
    let delay = Some(Duration::from_secs(2));
    let late = Draft { payload: "0".into(), delay, ..Draft::default() }.accept();
    let due = late.deliver_at.unwrap();
    append_all(&lane, &route, &topic, vec![late, numbered(1)]).await;
    let member = join(&lane, &topic, GroupMode::Shared).await;
    ack(&*member, &take(&*member, 1).await).await;
    drop(member);
    lane.close().await;
    let lane = open(dir.path()).unwrap();
    let member = join(&lane, &topic, GroupMode::KeyShared).await;
    is_quiet(&*member).await;
    assert!(Timestamp::now() < due, "this took too long to tell");
    assert_eq!(handed_numbers(&take(&*member, 1).await), [0]);
    assert!(Timestamp::now() >= due);
}

/// A commit has two fsyncs, see `full`. Where the first fails nothing is in storage, where the second does all is.
#[tokio::test]
async fn a_seek_or_deletion_whose_fsync_fails_is_what_storage_says() {
    for (syncs, happened) in [(vec![false], false), (vec![true, false], true)] {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(Disk::default());
        let (lane, route, topic) = (open_on(&disk, dir.path()), for_ever(), topic("a"));
        append_all(&lane, &route, &topic, (0..5).map(numbered).collect()).await;
        let member = join(&lane, &topic, GroupMode::Exclusive).await;
        ack(&*member, &take(&*member, 5).await[..3]).await;
        let as_it_was_told = |error: &LaneError| match error {
            LaneError::OutcomeUnknown(_) => happened,
            LaneError::Unavailable(_) => !happened,
            _ => false,
        };

        disk.syncs(syncs.clone());
        let error = lane.seek(&route, &topic, "g", Start::Earliest).await.unwrap_err();
        assert!(as_it_was_told(&error), "{error:?}");
        let left: Vec<usize> = if happened {
            assert_eq!(handed_numbers(&take(&*member, 5).await), [0, 1, 2, 3, 4]);
            (0..5).collect()
        } else {
            is_quiet(&*member).await;
            vec![3, 4]
        };
        drop(member);

        until("the recovery", async || lane.probe().await.is_ok()).await;
        disk.syncs(syncs);
        let error = lane.delete_group(&route, &topic, "g").await.unwrap_err();
        assert!(as_it_was_told(&error), "{error:?}");
        assert_eq!(lane.groups(&route, &topic).await.unwrap().is_empty(), happened);
        until("the recovery", async || lane.probe().await.is_ok()).await;
        // The group of before, or one that begins anew: here both have the same to do.
        let member = join(&lane, &topic, GroupMode::Exclusive).await;
        assert_eq!(handed_numbers(&take(&*member, left.len()).await), left);
        is_quiet(&*member).await;
    }
}

/// Whether it still waits after a moment, in which it has come into the line.
async fn waits<T>(what: impl Future<Output = T> + Unpin) -> bool {
    tokio::time::timeout(Duration::from_millis(100), what).await.is_err()
}

/// What shares a commit is done in the order of the line: an acknowledgement from before a seek is of no account behind
/// it, and none brings a deleted group back.
#[tokio::test]
async fn acknowledgements_a_seek_and_a_deletion_can_share_a_commit() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    let (lane, route, topic) = (open_on(&disk, dir.path()), for_ever(), topic("a"));
    append_all(&lane, &route, &topic, (0..5).map(numbered).collect()).await;
    let member = join(&lane, &topic, GroupMode::Shared).await;
    let tags: Vec<_> = take(&*member, 5).await.iter().map(|handed| handed.tag).collect();
    // The writer is busy with this one, and the others wait in line.
    disk.is_stuck(true);
    let mut busy = lane.append(&route, &topic, numbered(5), Publisher::default()).await.unwrap();
    assert!(waits(&mut busy).await);
    let mut early = member.ack(tags[..2].to_vec());
    let mut seek = lane.seek(&route, &topic, "g", Start::Earliest);
    let mut late = member.ack(tags[2..].to_vec());
    assert!(waits(&mut early).await && waits(&mut seek).await && waits(&mut late).await);
    disk.is_stuck(false);
    for done in [early, seek, late] {
        soon(done).await.unwrap();
    }
    soon(busy).await.unwrap();
    let tags: Vec<_> = take(&*member, 6).await.iter().map(|handed| handed.tag).collect();
    assert_eq!(backlog(&*lane, &route, &topic).await, 6);

    disk.is_stuck(true);
    let mut busy = lane.append(&route, &topic, numbered(6), Publisher::default()).await.unwrap();
    assert!(waits(&mut busy).await);
    assert!(waits(member.ack(tags)).await);
    drop(member);
    let mut delete = lane.delete_group(&route, &topic, "g");
    assert!(waits(&mut delete).await);
    disk.is_stuck(false);
    assert!(soon(delete).await.unwrap());
    soon(busy).await.unwrap();
    lane.close().await;
    let lane = open(dir.path()).unwrap();
    assert_eq!(lane.groups(&route, &topic).await.unwrap(), []);
}
