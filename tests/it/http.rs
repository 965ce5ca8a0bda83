//! HTTP for clients and operators.

use std::time::Duration;

use serde_json::json;

use crate::harness::{Plan, ROUTES, Span, answer, draft, eventually, http_client, next, nothing, replace};

#[tokio::test]
async fn topics_are_declared_listed_shown_and_forgotten() {
    let span = Span::start().await;
    let (status, created) = span.post("/topics", r#"{"name":"declared.a"}"#).await;
    assert_eq!(
        (status, created),
        (201, json!({"status": "created", "topic": "declared.a", "lane": "durable"}))
    );
    let (status, exists) = span.post("/topics", r#"{"name":"declared.a"}"#).await;
    assert_eq!((status, &exists["error"]["code"]), (409, &json!("TOPIC_EXISTS")));
    let (status, lost) = span.post("/topics", r#"{"name":"nowhere"}"#).await;
    assert_eq!((status, &lost["error"]["code"]), (404, &json!("NO_ROUTE")));
    assert_eq!(span.post("/topics", "nonsense").await.0, 400);

    let mut client = span.client().await;
    client.subscribe("declared.a", nothing()).await.unwrap();
    client.publish("declared.a", &draft("1")).await.unwrap();
    let (_, shown) = span.get("/topics/declared.a").await;
    assert_eq!(
        (&shown["messages"], &shown["subscribers"], &shown["lane"]),
        (&json!(1), &json!(1), &json!("durable"))
    );
    let (_, list) = span.get("/topics").await;
    assert_eq!(list["topics"][0]["name"], "declared.a");
    let (_, stats) = span.get("/stats").await;
    assert_eq!(
        stats,
        json!({"topics": {"declared.a": {"messages": 1, "subscribers": 1, "lane": "durable"}}})
    );

    let response = http_client().delete(span.http("/topics/declared.a")).send().await.unwrap();
    assert_eq!(response.status(), 204);
    assert_eq!(next(&mut client).await.kind, "event");
    assert_eq!(next(&mut client).await.code.as_deref(), Some("TOPIC_DELETED"));
    assert_eq!(span.get("/topics/declared.a").await.0, 404);
    // Forgotten, not erased: declared anew, it has its message.
    span.post("/topics", r#"{"name":"declared.a"}"#).await;
    let (_, page) = span.get("/topics/declared.a/messages").await;
    assert_eq!(page["messages"][0]["message"]["payload"], 1);
}

#[tokio::test]
async fn a_publish_by_http_is_heard_and_read_back_page_by_page() {
    let span = Span::start().await;
    let mut client = span.client().await;
    client.subscribe("orders.h", nothing()).await.unwrap();
    for n in 0..5 {
        let (status, ack) = span.post("/publish/orders.h", n.to_string()).await;
        assert_eq!((status, &ack["status"], &ack["lane"]), (200, &json!("ok"), &json!("durable")));
        assert_eq!(next(&mut client).await.payload().unwrap(), n.to_string().into_bytes());
    }
    let (mut from, mut read) = ("earliest".to_owned(), Vec::new());
    loop {
        let (status, page) = span.get(&format!("/topics/orders.h/messages?limit=2&from={from}")).await;
        assert_eq!(status, 200);
        let messages = page["messages"].as_array().unwrap();
        if messages.is_empty() {
            break;
        }
        read.extend(messages.iter().map(|event| event["message"]["payload"].clone()));
        from = page["next"].as_str().unwrap().to_owned();
    }
    assert_eq!(read, [0, 1, 2, 3, 4]);
    span.post("/publish/telemetry.h", "[1]").await;
    let (_, page) = span.get("/topics/telemetry.h/messages").await;
    assert_eq!((&page["messages"][0]["message"]["payload"], &page["next"]), (&json!([1]), &json!(null)));
    let big = "x".repeat(600_000);
    let (status, refused) = span.post("/publish/orders.h", big).await;
    assert_eq!((status, &refused["error"]["code"]), (413, &json!("TOO_LARGE")));
    assert_eq!(span.post("/publish/a..b", "1").await.0, 400);
    assert_eq!(span.post("/publish/_x", "1").await.0, 403);
}

#[tokio::test]
async fn a_publish_by_http_may_ask_for_a_delay_where_the_topic_knows_delays() {
    let span = Span::start().await;
    let publish = async |topic: &str, delay: &str| {
        let request = http_client().post(span.http(&format!("/publish/{topic}"))).body("1");
        let (status, told) = answer(request.header("twinspan-delay-ms", delay).send().await.unwrap()).await;
        (status, told["error"]["code"].as_str().map(str::to_owned))
    };
    assert_eq!(publish("orders.later", "5").await, (200, None));
    assert_eq!(publish("telemetry.later", "5").await, (400, Some("LANE_MISMATCH".into())));
    assert_eq!(publish("orders.later", "soon").await, (400, Some("BAD_REQUEST".into())));
}

#[tokio::test]
async fn a_request_by_http_returns_the_reply() {
    let span = Span::start().await;
    let (status, refused) = span.post("/request/svc.x", "1").await;
    assert_eq!((status, &refused["error"]["code"]), (404, &json!("NO_RESPONDERS")));
    let mut server = span.client().await;
    server.subscribe("svc.x", nothing()).await.unwrap();
    let serving = async {
        let request = next(&mut server).await;
        server.reply(&request.reply_to.unwrap(), &draft(r#"{"ok":true}"#)).await.unwrap();
        // The second is left waiting.
        next(&mut server).await
    };
    let asking = async {
        assert_eq!(span.post("/request/svc.x?timeout_ms=5000", "1").await, (200, json!({"ok": true})));
        let (status, refused) = span.post("/request/svc.x?timeout_ms=50", "1").await;
        assert_eq!((status, &refused["error"]["code"]), (504, &json!("TIMEOUT")));
    };
    tokio::join!(serving, asking);
}

#[tokio::test]
async fn health_readiness_and_metrics_say_how_it_is() {
    let span = Span::start().await;
    let mut client = span.client().await;
    client.subscribe("orders.>", nothing()).await.unwrap();
    client.publish("orders.a", &draft("123")).await.unwrap();
    next(&mut client).await;
    assert_eq!(span.get("/livez").await.0, 200);
    assert_eq!(span.get("/readyz").await.0, 200);
    let (status, health) = span.get("/health").await;
    assert_eq!((status, &health["status"]), (200, &json!("ok")));
    let lane = |backend: &str| json!({"status": "up", "backend": backend});
    let mut durable = lane("embedded log");
    durable["outage"] = json!({"breaker": "closed", "open_topics": 0, "spool": null});
    assert_eq!(health["lanes"], json!({"ephemeral": lane("in-process bus"), "durable": durable}));
    assert_eq!((&health["topics"], &health["subscribers"]), (&json!(1), &json!(1)));

    let response = http_client().get(span.admin("/health")).send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "application/health+json");
    let (_, health) = answer(response).await;
    assert_eq!(health["status"], "pass", "{health}");

    let metrics = http_client().get(span.admin("/metrics")).send().await.unwrap().text().await.unwrap();
    for line in [
        r#"twinspan_messages_total{direction="in",lane="durable",outcome="ok",route="orders"} 1"#,
        r#"twinspan_message_bytes_total{direction="in",lane="durable",route="orders"} 3"#,
        r#"twinspan_publish_duration_seconds_count{lane="durable",route="orders"} 1"#,
        r#"twinspan_connections{dialect="json"} 1"#,
        r#"twinspan_subscriptions{lane="durable"} 1"#,
        r#"twinspan_lane_up{lane="ephemeral"} 1"#,
        r#"twinspan_lane_up{lane="durable"} 1"#,
        "twinspan_config_last_reload_success 1",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
    // What was written is counted once the socket has it.
    eventually("the delivery is counted", async || {
        span.metric(r#"twinspan_delivery_duration_seconds_count{lane="durable",route="orders"}"#) == 1.0
    })
    .await;
    let (_, connections) = answer(http_client().get(span.admin("/connections")).send().await.unwrap()).await;
    assert_eq!(connections["connections"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_bad_reload_is_told_everywhere_and_a_good_one_heals() {
    let span = Span::start().await;
    let reload = async || answer(http_client().post(span.admin("/reload")).send().await.unwrap()).await;
    assert_eq!(reload().await.0, 200);
    replace(&span.routes, &ROUTES.replace("lane = \"durable\"", "lane = \"durabel\""));
    let (status, refused) = reload().await;
    assert_eq!((status, &refused["error"]["code"]), (400, &json!("BAD_REQUEST")));
    assert!(refused["problems"][0].as_str().unwrap().contains("routes.toml:"), "{refused}");
    assert_eq!(span.metric("twinspan_config_last_reload_success"), 0.0);
    let (_, health) = answer(http_client().get(span.admin("/health")).send().await.unwrap()).await;
    assert_eq!(
        (&health["status"], &health["checks"]["config:reload"][0]["status"]),
        (&json!("warn"), &json!("warn"))
    );
    let client = span.client().await;
    client.publish("orders.a", &draft("1")).await.unwrap();
    replace(&span.routes, &format!("{ROUTES}\n[[route]]\ntopic = \"new.>\"\nlane = \"ephemeral\"\n"));
    eventually("the good file is in force without a word", async || {
        client.publish("new.a", &draft("1")).await.is_ok()
    })
    .await;
    assert_eq!(span.metric("twinspan_config_last_reload_success"), 1.0);
    let (_, explained) = answer(http_client().get(span.admin("/explain/new.a")).send().await.unwrap()).await;
    assert_eq!(explained["route"], "new.>", "{explained}");
}

#[tokio::test]
async fn a_handshake_that_does_not_come_is_not_waited_for() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut plan = Plan::default();
    plan.settings.session.handshake_timeout = Duration::from_millis(300);
    let span = Span::with(plan).await;
    for beginning in ["", "GET /ws HTTP/1.1\r\nHost: x\r\n"] {
        let mut socket = tokio::net::TcpStream::connect(span.running.listen).await.unwrap();
        socket.write_all(beginning.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "a connection that said {beginning:?} is closed");
    }
}
