//! What clients see while a broker is away.

use std::time::{Duration, Instant};

use serde_json::json;
use twinspan::config::server::ReadyRequires;
use twinspan::lane::settings::EphemeralBackend;
use twinspan::message::Lane;

use crate::brokers::{Broker, Options, left_out};
use crate::harness::{Plan, Span, draft, eventually, next, next_payload, nothing, refused};

#[tokio::test]
async fn a_killed_nats_is_announced_refused_at_once_and_the_hole_is_a_gap() {
    if left_out() {
        return;
    }
    let mut nats = Broker::nats(&Options::default()).await;
    let mut plan = Plan::default();
    plan.settings.lanes.ephemeral.backend = EphemeralBackend::Nats;
    plan.settings.lanes.ephemeral.url = vec![nats.url()];
    plan.settings.server.ready_requires = ReadyRequires::Lanes(vec![Lane::Ephemeral]);
    let span = Span::with(plan).await;
    let mut client = span.client().await;
    let mut durable = span.client().await;
    client.subscribe("telemetry.>", nothing()).await.unwrap();
    durable.subscribe("orders.o", nothing()).await.unwrap();
    client.publish("telemetry.o", &draft("1")).await.unwrap();
    assert_eq!(next_payload(&mut client).await, "1");
    assert_eq!(span.get("/readyz").await.0, 200);

    nats.kill();
    let down = next(&mut client).await;
    assert_eq!((down.code.as_deref(), down.lane.as_deref()), (Some("LANE_DOWN"), Some("ephemeral")));
    let asked = Instant::now();
    assert_eq!(refused(client.publish("telemetry.o", &draft("2")).await), "LANE_UNAVAILABLE");
    assert_eq!(refused(client.subscribe("telemetry.new", nothing()).await), "LANE_UNAVAILABLE");
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    assert_eq!(span.get("/readyz").await.0, 503);
    let (status, health) = span.get("/health").await;
    assert_eq!((status, &health["status"]), (200, &json!("degraded")));
    assert_eq!(span.metric(r#"twinspan_lane_up{lane="ephemeral"}"#), 0.0);
    // The other lane takes no notice.
    durable.publish("orders.o", &draft("3")).await.unwrap();
    assert_eq!(next_payload(&mut durable).await, "3");

    nats.restart().await;
    let mut told = Vec::new();
    while told.len() < 2 {
        let frame = next(&mut client).await;
        match frame.kind.as_str() {
            "gap" => {
                assert_eq!((frame.reason.as_deref(), frame.dropped), (Some("outage"), None));
                told.push("gap");
            }
            _ => {
                assert_eq!(
                    (frame.code.as_deref(), frame.lane.as_deref()),
                    (Some("LANE_UP"), Some("ephemeral"))
                );
                told.push("up");
            }
        }
    }
    eventually("messages flow again", async || client.publish("telemetry.o", &draft("4")).await.is_ok())
        .await;
    assert_eq!(next_payload(&mut client).await, "4");
    assert_eq!(span.get("/readyz").await.0, 200);
}
