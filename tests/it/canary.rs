//! Heartbeats go through both lanes each second, and what they tell is told.

use crate::harness::{Span, answer, eventually, http_client, on_both_kinds};

async fn heartbeats_of_both_lanes_are_measured_alike(span: Span) {
    let check = async |lane: &str| {
        let (_, health) = answer(http_client().get(span.admin("/health")).send().await.unwrap()).await;
        health["checks"][format!("{lane}:lane")][0].clone()
    };
    for lane in ["ephemeral", "durable"] {
        let count = format!("twinspan_probe_duration_seconds_count{{lane=\"{lane}\"}}");
        eventually("heartbeats come back", async || span.metric(&count) >= 2.0).await;
        let said = check(lane).await;
        assert_eq!(said["status"], "pass", "{said}");
        let (p50, p99) = (&said["probe"]["p50_ms"], &said["probe"]["p99_ms"]);
        assert!(p50.as_f64().unwrap() > 0.0 && p99.as_f64() >= p50.as_f64(), "{said}");
        assert!(said["observedValue"].as_f64().unwrap() > 0.0, "{said}");
        assert!(said["since"].is_string(), "{said}");
        assert_eq!(span.metric(&format!("twinspan_lane_state{{lane=\"{lane}\"}}")), 2.0);
    }
}

on_both_kinds!(heartbeats_of_both_lanes_are_measured_alike);
