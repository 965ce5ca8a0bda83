//! SIGKILL and power cuts in the middle of the load: nothing that was confirmed is lost.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use super::disk::Disk;
use super::*;

const ROLE: &str = "TWINSPAN_TEST_CRASHING_LOG";
const ROUNDS: usize = 10;

/// Appends for ever, from where the log ends, and prints each number once it was confirmed; a group takes and
/// acknowledges, and prints what was confirmed of that.
async fn publish_until_killed(dir: &Path) {
    let lane = open(dir).unwrap();
    let (route, topic) = (for_ever(), topic("load"));
    let next = read(&*lane, &route, &topic, Start::Last(1)).await.last().map_or(0, |last| number(last) + 1);
    let (confirmed, mut lines) = tokio::sync::mpsc::channel::<(usize, _)>(1000);
    let member = lane.join(&route, &topic, shared("g", Start::Earliest, 500)).await.unwrap();
    tokio::spawn(async move {
        loop {
            let handed: Vec<_> = member.next().await.unwrap().into_iter().map(Result::unwrap).collect();
            member.ack(handed.iter().map(|handed| handed.tag).collect()).await.unwrap();
            let last = handed.iter().map(|handed| number(&handed.envelope)).max().unwrap();
            writeln!(std::io::stdout().lock(), "acked {last}").unwrap();
        }
    });
    tokio::spawn(async move {
        for n in next.. {
            let message = of_size(n, fastrand::usize(1..3000), Timestamp::now().as_millis());
            let receipt = lane.append(&route, &topic, message, Publisher::default()).await.unwrap();
            confirmed.send((n, receipt)).await.unwrap();
        }
    });
    while let Some((n, receipt)) = lines.recv().await {
        let position = receipt.await.unwrap();
        writeln!(std::io::stdout().lock(), "stored {n} {position}").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_killed_under_load_keeps_all_it_has_confirmed() {
    if let Some(dir) = std::env::var_os(ROLE) {
        return publish_until_killed(Path::new(&dir)).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut stored_ever = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "journal::crash::a_log_that_is_killed_under_load_keeps_all_it_has_confirmed"])
            .arg("--nocapture")
            .env(ROLE, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let (mut stored, mut acked) = (Vec::new(), None);
        // Killed at a random number of confirmations: wherever that finds the writer.
        let until = fastrand::usize(1..3000);
        let take = |line: String, stored: &mut Vec<(usize, Position)>, acked: &mut Option<usize>| {
            let mut words = line.split(' ');
            match words.next() {
                Some("stored") => {
                    let n = words.next().unwrap().parse().unwrap();
                    // The last line may have been cut short.
                    if let Some(Ok(position)) = words.next().map(str::parse) {
                        stored.push((n, position));
                    }
                }
                Some("acked") => {
                    let n: usize = words.next().unwrap().parse().unwrap();
                    *acked = (*acked).max(Some(n));
                }
                _ => {}
            }
        };
        while stored.len() < until {
            take(lines.next().expect("the child lives"), &mut stored, &mut acked);
        }
        child.kill().unwrap();
        // What it printed before it died counts.
        lines.for_each(|line| take(line, &mut stored, &mut acked));
        child.wait().unwrap();

        let lane = open(dir.path()).unwrap();
        let (route, topic) = (for_ever(), topic("load"));
        let all = read(&*lane, &route, &topic, Start::Earliest).await;
        let last = stored.last().unwrap().0;
        assert!(all.len() > last, "round {round}: {last} was confirmed, {} are there", all.len());
        assert_eq!(numbers(&all), (0..all.len()).collect::<Vec<_>>(), "round {round}");
        for (n, position) in &stored {
            assert_eq!(&all[*n].stored.as_ref().unwrap().position, position, "round {round}");
        }
        // Of the group, what was acknowledged never comes again. It acknowledges all it takes, in order.
        if let Some(acked) = acked {
            let backlog = backlog(&*lane, &route, &topic).await;
            assert!(backlog < (all.len() - acked) as u64, "round {round}: {acked} acked, backlog {backlog}");
        }
        lane.close().await;
        stored_ever = all.len();
    }
    assert!(stored_ever > ROUNDS);
}

/// SIGKILL leaves the system's cache alone, so it cannot tell whether an fsync came before a receipt. This does: of
/// what was written since the last fsync, each sector is there or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_takes_nothing_that_was_confirmed() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    // Its birth goes to a file of another name, which is renamed once it is synced: the same file all along.
    disk.remembers();
    let rules = policy(Retention::default());
    let lane = Journal::open_with(dir.path(), rules, SOON, Arc::new(Metrics::new()), disk.opener()).unwrap();
    let (route, topic) = (for_ever(), topic("load"));
    let confirmed = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (count, publisher, on) = (confirmed.clone(), lane.clone(), topic.clone());
    let publishing = tokio::spawn(async move {
        let (line, mut receipts) = tokio::sync::mpsc::channel(50);
        let counting = tokio::spawn(async move {
            while let Some(receipt) = receipts.recv().await {
                let receipt: twinspan::lane::contract::Receipt = receipt;
                receipt.await.unwrap();
                count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        });
        for n in 0.. {
            let message = of_size(n, fastrand::usize(1..1000), 5);
            tokio::time::sleep(Duration::from_millis(1)).await;
            line.send(publisher.append(&for_ever(), &on, message, Publisher::default()).await.unwrap())
                .await
                .unwrap();
            if counting.is_finished() {
                break;
            }
        }
    });
    for round in 1..=10 {
        until("more of the load", async || confirmed.load(std::sync::atomic::Ordering::SeqCst) > round * 20)
            .await;
        let surely = confirmed.load(std::sync::atomic::Ordering::SeqCst);
        let image = disk.after_power_cut();
        let after = tempfile::tempdir().unwrap();
        fs::write(after.path().join("journal.redb"), image).unwrap();
        let lane = open(after.path()).unwrap();
        let all = read(&*lane, &route, &topic, Start::Earliest).await;
        assert!(all.len() >= surely, "round {round}: {surely} were confirmed, {} are there", all.len());
        assert_eq!(numbers(&all), (0..all.len()).collect::<Vec<_>>(), "round {round}");
        append(&lane, &route, &topic, all.len()).await.unwrap();
        lane.close().await;
    }
    publishing.abort();
}

/// Torn at each sector of its last commit, whether that sector was written, or half of it: what was confirmed is all
/// there, and of the commit all or nothing.
#[tokio::test]
async fn a_log_that_is_torn_anywhere_in_its_last_commit_is_whole_up_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::default());
    disk.remembers();
    let rules = policy(Retention::default());
    let lane = Journal::open_with(dir.path(), rules, SOON, Arc::new(Metrics::new()), disk.opener()).unwrap();
    let (route, topic) = (for_ever(), topic("a"));
    for n in 0..10 {
        append(&lane, &route, &topic, n).await.unwrap();
    }
    // Some records in one commit: they wait in line behind one that hangs.
    disk.is_stuck(true);
    let mut receipts = Vec::new();
    for n in 10..14 {
        receipts.push(lane.append(&route, &topic, numbered(n), Publisher::default()).await.unwrap());
    }
    disk.tears();
    disk.is_stuck(false);
    for receipt in receipts {
        soon(receipt).await.unwrap();
    }
    let images = disk.torn();
    let mut found = BTreeSet::new();
    assert!(!images.is_empty(), "what is confirmed was written");
    for (at, image) in images.into_iter().enumerate() {
        let after = tempfile::tempdir().unwrap();
        fs::write(after.path().join("journal.redb"), image).unwrap();
        let lane = open(after.path()).unwrap_or_else(|error| panic!("image {at}: {error}"));
        let there = numbers(&read(&*lane, &route, &topic, Start::Earliest).await);
        assert_eq!(there, (0..there.len()).collect::<Vec<_>>(), "image {at}");
        found.insert(there.len());
        append(&lane, &route, &topic, there.len()).await.unwrap();
        lane.close().await;
    }
    // Before the one that hung, between the two, after the other.
    assert!((2..=3).contains(&found.len()), "each commit is there or is not: {found:?}");
    assert!(found.first() >= Some(&10) && found.last() == Some(&14), "{found:?}");
}
