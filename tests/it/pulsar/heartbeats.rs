//! A heartbeat tells a broker that stores from one that delivers too.

use serde_json::json;
use twinspan::lane::contract::LaneError;

use super::*;
use crate::harness::eventually;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_that_is_stored_and_not_delivered_is_missing() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    let namespace = format!("public/{}", MessageId::new());
    admin(broker, Method::PUT, &format!("namespaces/{namespace}"), Value::Null).await;
    let bed = Bed::routed(broker, route("beats.>", &format!("persistent://{namespace}/{{topic}}"))).await;
    let rate = |messages: i64| {
        json!({"dispatchThrottlingRateInMsg": messages, "dispatchThrottlingRateInByte": -1,
               "ratePeriodInSecond": 3600, "relativeToPublishRate": false})
    };
    let set = async |messages| {
        admin(broker, Method::POST, &format!("namespaces/{namespace}/dispatchRate"), rate(messages)).await;
    };
    bed.lane.probe().await.unwrap();
    set(1).await;
    let missing = async || match bed.lane.probe().await {
        Err(LaneError::Unavailable(said)) => said.contains("did not deliver it"),
        _ => false,
    };
    eventually("nothing is delivered any more", missing).await;
    assert!(bed.lane.state().borrow().is_up(), "it stores what it is given");
    set(-1).await;
    eventually("heartbeats come back", async || bed.lane.probe().await.is_ok()).await;
}
