//! Three bridges on the same brokers behind a plain TCP balancer keep every promise that one keeps.

use std::time::Duration;

use tokio::time::sleep;
use twinspan::message::MessageId;

use crate::brokers::{left_out, shared_nats, shared_pulsar};
use crate::checker::Hurt;
use crate::crowd::{self, Book, Crowd};
use crate::fleet::Fleet;
use crate::harness::{PATIENCE, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_bridges_behind_a_balancer_keep_every_promise_while_one_is_killed_and_comes_back() {
    if left_out() {
        return;
    }
    let (nats, pulsar) = tokio::join!(shared_nats(), shared_pulsar());
    let settings = crowd::settings(&nats.url(), &pulsar.url(), &pulsar.admin_url());
    let own = format!("t{}", MessageId::new()).replace('-', "");
    crowd::make_namespace(pulsar, &own).await;
    let book = Book::begin();
    let fleet = Fleet::start(3, &crowd::routes(&own), settings, book.clone()).await;
    let crowd = Crowd::begin(&fleet.url(), &book, fastrand::u64(..)).await;
    for bridge in 0..3 {
        eventually("the balancer leads to each of them", async || fleet.connections(bridge).await >= 5.0)
            .await;
    }
    let bridges = [0, 2].map(|bridge| fleet.with(bridge, |process| (process.listen, process.url())).unwrap());
    crowd::fall_behind(bridges[0].0, &bridges[1].1, &book).await;
    let missed = book.read(|history| history.announced());
    assert!(missed > 0, "who fell behind was told so");
    // How long things go well, and how long a bridge is away, is what the test is about.
    sleep(Duration::from_secs(3)).await;
    let killed = book.now();
    fleet.kill(1).await;
    sleep(Duration::from_secs(2)).await;
    fleet.begin(1).await;
    book.disturbed(Hurt::Bridge, killed, book.now());
    sleep(Duration::from_secs(3)).await;
    crowd.finish(&fleet.url(), &book, PATIENCE * 3).await;
    assert!(book.read(|history| history.operations.len()) > 300, "there was load");
    let told = book.told();
    assert!(told.is_empty(), "{}{} violations:\n{}", fleet.logs(), told.len(), told.join("\n"));
}
