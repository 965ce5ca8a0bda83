//! A topic whose backlog is full: what is refused is refused by name, and nothing else is lost with it.

use std::collections::BTreeSet;

use serde_json::json;
use twinspan::lane::contract::{LaneError, Publisher};
use twinspan::message::{Message, Start};

use super::*;
use crate::brokers::Options;
use crate::durable_contract::{numbers, read};

/// What became of numbered messages of a kilobyte.
#[derive(Default)]
struct Books {
    acked: BTreeSet<usize>,
    refused: BTreeSet<usize>,
    unknown: BTreeSet<usize>,
}

impl Books {
    /// Publishes ten at once, and says whether the last was confirmed.
    async fn publish_ten(&mut self, bed: &Bed) -> bool {
        let first = self.acked.len() + self.refused.len() + self.unknown.len();
        let mut receipts = Vec::new();
        for n in first..first + 10 {
            let headers = [("padding".to_owned(), "x".repeat(1000))].into();
            let message = Message { headers, ..numbered(n) };
            receipts
                .push(bed.lane.append(&bed.route, &bed.topic, message, Publisher::default()).await.unwrap());
        }
        for (receipt, n) in receipts.into_iter().zip(first..) {
            match soon(receipt).await {
                Ok(_) => self.acked.insert(n),
                Err(LaneError::StorageFull(said)) => {
                    assert!(said.contains("quota"), "{said}");
                    self.refused.insert(n)
                }
                Err(LaneError::OutcomeUnknown(said)) => {
                    assert!(said.contains("quota"), "{said}");
                    self.unknown.insert(n)
                }
                Err(error) => panic!("{error:?}"),
            };
        }
        self.acked.contains(&(first + 9))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_whose_backlog_is_full_refuses_by_name_and_takes_more_once_it_is_consumed() {
    if left_out() {
        return;
    }
    let set = vec!["backlogQuotaCheckIntervalInSeconds=1".into()];
    let broker = Broker::pulsar(&Options { set, ..Options::default() }).await;
    for policy in ["producer_request_hold", "producer_exception"] {
        let namespace = format!("public/{policy}");
        admin(&broker, Method::PUT, &format!("namespaces/{namespace}"), Value::Null).await;
        let quota = json!({ "limitSize": 100_000, "limitTime": -1, "policy": policy });
        let path = format!("namespaces/{namespace}/backlogQuota?backlogQuotaType=destination_storage");
        admin(&broker, Method::POST, &path, quota).await;
        let bed = Bed::routed(&broker, route("t.>", &format!("persistent://{namespace}/{{topic}}"))).await;
        let member = bed.join(Start::Earliest).await;

        let mut books = Books::default();
        // The broker looks at its quotas each second, so more may be stored than it allows.
        soon(async {
            while books.publish_ten(&bed).await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        let asked = Instant::now();
        assert!(!books.publish_ten(&bed).await, "{policy}: it stays full");
        assert!(asked.elapsed() < Duration::from_secs(2), "{policy}: said after {:?}", asked.elapsed());
        assert!(books.refused.len() >= 10, "{policy}: {} are known not to be stored", books.refused.len());

        let full = books.acked.len();
        soon(async {
            let mut got = 0;
            while got < full {
                let handed = member.next().await.unwrap();
                got += handed.len();
                member.ack(handed.into_iter().map(|handed| handed.unwrap().tag).collect()).await.unwrap();
            }
            while !books.publish_ten(&bed).await {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;

        let stored = numbers(&read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await);
        let once: BTreeSet<_> = stored.iter().copied().collect();
        assert!(books.acked.is_subset(&once), "{policy}: confirmed and not stored");
        assert!(books.refused.is_disjoint(&once), "{policy}: said not to be stored, and stored");
        let stored: Vec<_> = stored.into_iter().filter(|n| !books.unknown.contains(n)).collect();
        assert!(stored.is_sorted(), "{policy}: {stored:?}");
    }
}
