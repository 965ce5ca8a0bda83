//! Routes with a schema: what does not fit is not carried.

use serde_json::json;

use crate::harness::{Plan, Span, draft, next, next_payload, nothing, refused, silent};
use twinspan::client::ClientError;

const ROUTES: &str = r#"
    [[route]]
    topic = "live.>"
    lane = "ephemeral"
    schema = "reading.json"

    [[route]]
    topic = "kept.>"
    lane = "durable"
    schema = "reading.json"
"#;
const SCHEMA: &str = r#"{"type":"object","required":["n"],"properties":{"n":{"type":"integer"}}}"#;

async fn span() -> Span {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("reading.json"), SCHEMA).unwrap();
    Span::inside(Plan { routes: ROUTES.into(), ..Plan::default() }, directory).await
}

#[tokio::test]
async fn what_does_not_fit_is_refused_with_its_place_on_either_lane_and_reaches_nobody() {
    let span = span().await;
    let (mut subscriber, mut publisher) = (span.client().await, span.client().await);
    for topic in ["live.a", "kept.a"] {
        subscriber.subscribe(topic, nothing()).await.unwrap();
        for (payload, expected) in [
            (r#"{"n":"x"}"#, r#"at "/n": this is not of type "integer""#),
            ("[", "it is not JSON"),
            ("", "it is not JSON"),
        ] {
            match publisher.publish(topic, &draft(payload)).await {
                Err(ClientError::Refused(error)) => {
                    assert_eq!(error.code, "BAD_REQUEST");
                    assert!(error.message.contains(expected), "{}", error.message);
                    assert!(error.message.ends_with("nothing was sent"), "{}", error.message);
                }
                other => panic!("{other:?}"),
            }
        }
        let frame = json!({"type": "publish", "topic": topic, "messages": [
            {"payload": {"n": 1}}, {"payload": {}}, {"payload": {"n": 2}}]});
        publisher.send(frame.to_string()).await.unwrap();
        let failed: Vec<_> = next(&mut publisher).await.results.iter().map(|r| r.error.is_some()).collect();
        assert_eq!(failed, [false, true, false]);
        assert_eq!(next_payload(&mut subscriber).await, r#"{"n":1}"#);
        assert_eq!(next_payload(&mut subscriber).await, r#"{"n":2}"#);
        silent(&mut subscriber).await;
    }
}

#[tokio::test]
async fn requests_and_http_are_held_to_the_schema_too() {
    let span = span().await;
    let client = span.client().await;
    let asked = client.request("live.a", &draft("1"), std::time::Duration::from_secs(1)).await;
    assert_eq!(refused(asked), "BAD_REQUEST");
    let (status, answer) = span.post("/publish/kept.a", "1").await;
    assert_eq!((status, &answer["error"]["code"]), (400, &json!("BAD_REQUEST")));
    assert_eq!(span.post("/publish/kept.a", r#"{"n":1}"#).await.0, 200);
}
