//! A disk that is full, that fails, that hangs: what publishers and readers see, and how it ends without a restart.

use std::process::Command;

use super::disk::Disk;
use super::*;
use twinspan::lane::contract::{LaneState, Publisher};

fn open_on(disk: &Arc<Disk>, dir: &Path, timeout: Duration) -> Arc<Journal> {
    let policy = policy(Retention::default());
    Journal::open_with(dir, policy, timeout, Arc::new(Metrics::new()), disk.opener()).unwrap()
}

fn file_len(dir: &Path) -> u64 {
    fs::metadata(dir.join("journal.redb")).unwrap().len()
}

/// Appends large messages until one is refused, and says how many were stored.
async fn fill(lane: &Journal, route: &Arc<Route>, topic: &Topic, from: usize) -> (usize, LaneError) {
    for n in from.. {
        let message = of_size(n, 50_000, Timestamp::now().as_millis());
        let receipt = lane.append(route, topic, message, Publisher::default()).await.unwrap();
        if let Err(error) = soon(receipt).await {
            return (n, error);
        }
    }
    unreachable!("the disk has an end")
}

#[tokio::test]
async fn a_full_disk_refuses_what_it_has_no_room_for_and_heals_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    let lane = open_on(&disk, dir.path(), SOON);
    let (route, topic) = (for_ever(), topic("a"));
    let tail = lane.tail(&route, &topic).await.unwrap();
    let (mut follower, _) = tail.follow();
    append(&lane, &route, &topic, 0).await.unwrap();

    disk.has_room_for(file_len(dir.path()));
    let (stored, error) = fill(&lane, &route, &topic, 1).await;
    assert!(matches!(error, LaneError::StorageFull(_)), "{error:?}");
    assert!(error.to_string().contains("nothing was stored"), "{error}");
    let state = lane.state();
    let down = state.borrow().clone();
    assert!(
        matches!(&down, LaneState::Down(why) if why.contains("full") && why.contains("can be read")),
        "{down:?}"
    );

    // Refused quickly, a thousand times over; reading goes on, and so does whoever follows.
    let asked = Instant::now();
    for n in 0..1000 {
        let error = append(&lane, &route, &topic, n).await.err();
        assert!(matches!(error, Some(LaneError::StorageFull(_))), "{error:?}");
    }
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    assert!(matches!(lane.probe().await, Err(LaneError::StorageFull(_))));
    assert_eq!(
        numbers(&read(&*lane, &route, &topic, Start::Earliest).await),
        (0..stored).collect::<Vec<_>>()
    );

    disk.has_room_for(u64::MAX);
    until("the recovery", async || state.borrow().is_up()).await;
    append(&lane, &route, &topic, stored).await.unwrap();
    lane.probe().await.unwrap();
    assert_eq!(
        numbers(&read(&*lane, &route, &topic, Start::Earliest).await),
        (0..=stored).collect::<Vec<_>>()
    );
    let mut heard = Vec::new();
    while heard.len() <= stored {
        heard.extend(soon(follower.next(99)).await.unwrap());
    }
    assert_eq!(numbers(&heard), (0..=stored).collect::<Vec<_>>());

    lane.close().await;
    let lane = open(dir.path()).unwrap();
    assert_eq!(
        numbers(&read(&*lane, &route, &topic, Start::Earliest).await),
        (0..=stored).collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn retention_makes_room_on_a_disk_that_stays_full() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    let rules = policy(Retention::default());
    let lane =
        Journal::open_with(dir.path(), rules.clone(), SOON, Arc::new(Metrics::new()), disk.opener()).unwrap();
    let (route, topic) = (for_ever(), topic("a"));
    disk.has_room_for(8 << 20);
    let (stored, _) = fill(&lane, &route, &topic, 0).await;
    assert!(!lane.state().borrow().is_up());
    let little = Retention { age: None, size: Some(1 << 20) };
    rules.replace(RouteTable::new([super::route("all", ">", little)]));
    until("the recovery", async || lane.state().borrow().is_up()).await;
    append(&lane, &route, &topic, stored).await.unwrap();
    assert!(read(&*lane, &route, &topic, Start::Earliest).await.len() < 25);
}

#[tokio::test]
async fn a_group_goes_on_behind_a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    let lane = open_on(&disk, dir.path(), SOON);
    let (route, topic) = (for_ever(), topic("a"));
    let member = lane.join(&route, &topic, shared("g", Start::Earliest, 1000)).await.unwrap();
    disk.has_room_for(file_len(dir.path()));
    let (stored, _) = fill(&lane, &route, &topic, 0).await;
    let mut handed = Vec::new();
    while handed.len() < stored {
        handed.extend(soon(member.next()).await.unwrap().into_iter().map(Result::unwrap));
    }
    let tags: Vec<_> = handed.iter().map(|handed| handed.tag).collect();
    let refused = member.ack(tags.clone()).await.err();
    assert!(matches!(refused, Some(LaneError::StorageFull(_))), "{refused:?}");
    disk.has_room_for(u64::MAX);
    until("the acknowledgement", async || member.ack(tags.clone()).await.is_ok()).await;
    assert_eq!(backlog(&*lane, &route, &topic).await, 0);
}

/// A commit has two fsyncs: the first for all it wrote, the second for the head that names it.
#[tokio::test]
async fn a_commit_whose_fsync_fails_is_never_confirmed_and_the_log_goes_on() {
    for (syncs, stored) in [(vec![false], false), (vec![true, false], true)] {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(Disk::default());
        let lane = open_on(&disk, dir.path(), SOON);
        let (route, topic) = (for_ever(), topic("a"));
        let (mut follower, _) = lane.tail(&route, &topic).await.unwrap().follow();
        append(&lane, &route, &topic, 0).await.unwrap();
        disk.syncs(syncs);
        let error = append(&lane, &route, &topic, 1).await.unwrap_err();
        let mut expected = vec![0];
        if stored {
            assert!(matches!(error, LaneError::OutcomeUnknown(_)), "{error:?}");
            expected.push(1);
        } else {
            assert!(matches!(error, LaneError::Unavailable(_)), "{error:?}");
        }
        assert_eq!(
            numbers(&read(&*lane, &route, &topic, Start::Earliest).await),
            expected,
            "as it was answered"
        );
        until("the recovery", async || append(&lane, &route, &topic, 2).await.is_ok()).await;
        expected.push(2);
        assert_eq!(numbers(&read(&*lane, &route, &topic, Start::Earliest).await), expected);
        // Followers hear what storage holds, in its order, though one of them was never confirmed.
        let mut heard = Vec::new();
        while heard.len() < expected.len() {
            heard.extend(soon(follower.next(99)).await.unwrap());
        }
        assert_eq!(numbers(&heard), expected);
    }
}

#[tokio::test]
async fn what_cannot_be_looked_up_stays_unknown_until_the_disk_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    let lane = open_on(&disk, dir.path(), SOON);
    let (route, topic) = (for_ever(), topic("a"));
    append(&lane, &route, &topic, 0).await.unwrap();
    disk.is_gone(true);
    disk.is_broken(true);
    let error = append(&lane, &route, &topic, 1).await.unwrap_err();
    assert!(matches!(error, LaneError::OutcomeUnknown(_)), "{error:?}");
    let error = append(&lane, &route, &topic, 2).await.unwrap_err();
    assert!(matches!(error, LaneError::Unavailable(_)), "{error:?}");
    assert!(!lane.state().borrow().is_up());
    disk.is_broken(false);
    disk.is_gone(false);
    until("the recovery", async || lane.state().borrow().is_up()).await;
    append(&lane, &route, &topic, 3).await.unwrap();
    assert_eq!(numbers(&read(&*lane, &route, &topic, Start::Earliest).await), [0, 3]);
}

#[tokio::test]
async fn a_read_that_failed_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    let lane = open_on(&disk, dir.path(), SOON);
    let (route, topic) = (for_ever(), topic("a"));
    let messages = (0..200).map(|n| of_size(n, 20_000, 5)).collect();
    append_all(&lane, &route, &topic, messages).await;
    let mut reader = lane.read(&route, &topic, Start::Earliest).await.unwrap();
    disk.fails_reads(1);
    let mut all = Vec::new();
    while let Some(batch) = soon(reader.next()).await.unwrap() {
        all.extend(batch.into_iter().map(Result::unwrap));
    }
    assert_eq!(numbers(&all), (0..200).collect::<Vec<_>>());
    until("the recovery", async || append(&lane, &route, &topic, 200).await.is_ok()).await;
}

#[tokio::test]
async fn a_message_that_meets_a_damaged_page_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    let lane = open_on(&disk, dir.path(), SOON);
    let (route, topic) = (for_ever(), topic("a"));
    append(&lane, &route, &topic, 0).await.unwrap();
    disk.panics_over(b"10013");
    // All wait in line behind a commit that hangs, so that they share the next.
    disk.is_stuck(true);
    let mut receipts = Vec::new();
    for n in 10_001..10_021 {
        receipts.push((n, lane.append(&route, &topic, numbered(n), Publisher::default()).await.unwrap()));
    }
    disk.is_stuck(false);
    for (n, receipt) in receipts {
        let outcome = soon(receipt).await;
        if n == 10_013 {
            assert!(matches!(outcome, Err(LaneError::Unavailable(_))), "{outcome:?}");
        } else {
            assert!(outcome.is_ok(), "{n}: {outcome:?}");
        }
    }
    let expected: Vec<_> = [0].into_iter().chain((10_001..10_021).filter(|n| *n != 10_013)).collect();
    assert_eq!(numbers(&read(&*lane, &route, &topic, Start::Earliest).await), expected);
    assert!(lane.state().borrow().is_up());
}

#[tokio::test]
async fn a_disk_that_hangs_leaves_the_outcome_unknown_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    let lane = open_on(&disk, dir.path(), Duration::from_millis(300));
    let (route, topic) = (for_ever(), topic("a"));
    append(&lane, &route, &topic, 0).await.unwrap();
    disk.is_stuck(true);
    let asked = Instant::now();
    let error = append(&lane, &route, &topic, 1).await.unwrap_err();
    assert!(matches!(error, LaneError::OutcomeUnknown(_)), "{error:?}");
    assert!(asked.elapsed() < Duration::from_secs(2));
    let asked = Instant::now();
    assert!(matches!(lane.probe().await, Err(LaneError::Unavailable(_))));
    assert!(asked.elapsed() < Duration::from_secs(2));
    assert_eq!(numbers(&read(&*lane, &route, &topic, Start::Earliest).await), [0], "reading goes on");

    // The line fills, and then says so instead of keeping the publisher.
    let mut refused = None;
    for n in 2..10_000 {
        match lane.append(&route, &topic, numbered(n), Publisher::default()).await {
            Ok(receipt) => drop(receipt),
            Err(error) => {
                refused = Some(error);
                break;
            }
        }
    }
    assert!(matches!(refused, Some(LaneError::Unavailable(_))), "{refused:?}");
    disk.is_stuck(false);
    until("the recovery", async || append(&lane, &route, &topic, 10_000).await.is_ok()).await;
    let all = read(&*lane, &route, &topic, Start::Earliest).await;
    assert_eq!(numbers(&all)[..2], [0, 1], "what was in line was stored all the same");
}

const LIMITED: &str = "TWINSPAN_TEST_LIMITED_LOG";

/// The same on a real limit of the system: the shell sets it for a child, which is this very test.
#[tokio::test]
async fn a_file_that_may_not_grow_is_a_full_disk() {
    if let Some(dir) = std::env::var_os(LIMITED) {
        let lane = open(Path::new(&dir)).unwrap();
        let (stored, error) = fill(&lane, &for_ever(), &topic("a"), 0).await;
        assert!(matches!(error, LaneError::StorageFull(_)), "{error:?}");
        assert_eq!(read(&*lane, &for_ever(), &topic("a"), Start::Earliest).await.len(), stored);
        lane.close().await;
        println!("stored {stored}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // In blocks of 512 bytes or of 1024, as the shell has it. The signal would end the process; without it, EFBIG.
    let script = "trap '' XFSZ; ulimit -f 8192; exec \"$0\" \"$@\"";
    let child = Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "journal::full::a_file_that_may_not_grow_is_a_full_disk", "--nocapture"])
        .env(LIMITED, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{text}{}", String::from_utf8_lossy(&child.stderr));
    let stored: usize =
        text.lines().find_map(|line| line.split_once("stored ")?.1.parse().ok()).expect("the child says it");
    assert!(stored > 10, "{stored}");
    // Without the limit, and with all that was confirmed.
    let lane = open(dir.path()).unwrap();
    let (route, topic) = (for_ever(), topic("a"));
    append(&lane, &route, &topic, stored).await.unwrap();
    assert_eq!(
        numbers(&read(&*lane, &route, &topic, Start::Earliest).await),
        (0..=stored).collect::<Vec<_>>()
    );
}
