//! What people write: settings in layers, routes in a file, and what they are told about both.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;
use twinspan::config::settings::Settings;
use twinspan::config::{self, Sources, layers};
use twinspan::message::Lane;
use twinspan::origin::Problem;
use twinspan::policy::{self, explain, source};
use twinspan::topic::Topic;

fn file(directory: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, text).unwrap();
    path
}

fn from_file(text: &str) -> Result<Settings, Vec<Problem>> {
    let directory = TempDir::new().unwrap();
    config::load(&Sources { files: vec![file(&directory, "t.toml", text)], ..Sources::default() })
}

fn from_set(set: &[&str]) -> Result<Settings, Vec<Problem>> {
    let directory = TempDir::new().unwrap();
    let files = vec![file(&directory, "empty.toml", "")];
    config::load(&Sources { files, set: set.iter().map(ToString::to_string).collect(), ..Sources::default() })
}

/// The problems, without the directory of the test.
fn told(problems: Vec<Problem>) -> Vec<String> {
    let name = |problem: &Problem| {
        let text = problem.to_string();
        match text.split_once("/t.toml:") {
            Some((_, rest)) => format!("t.toml:{rest}"),
            None => text,
        }
    };
    problems.iter().map(name).collect()
}

#[test]
fn every_sample_loads_without_a_problem() {
    let main = PathBuf::from("config/twinspan.toml");
    let stack = PathBuf::from("config/stack.toml");
    for files in [vec![], vec![main.clone()], vec![main.clone(), stack.clone()]] {
        let report = config::check(&Sources { files: files.clone(), ..Sources::default() });
        assert!(report.is_good(), "{files:?}: {report}");
        // The dead letters' route stands among those that were written.
        let rows: Vec<_> = report.to_string().split_whitespace().map(str::to_owned).collect();
        for pattern in ["orders.>", "dlq.orders.>"] {
            let row = rows.windows(3).find(|row| row[0] == pattern).unwrap_or_else(|| panic!("{report}"));
            assert!(row[1] == "durable" && row[2].starts_with("config/routes.toml:"), "{report}");
        }
    }
    let settings = config::load(&Sources { files: vec![main, stack], ..Sources::default() }).unwrap();
    assert_eq!(settings.of_lane(Lane::Ephemeral)[0].value, "nats");
    assert_eq!(settings.of_lane(Lane::Durable)[1].value, "pulsar");
}

#[test]
fn the_settings_sample_shows_every_setting_with_its_default() {
    let path = Path::new("config/twinspan.toml");
    let text = fs::read_to_string(path).unwrap();
    let leaves = layers::from_file(path, &text, 0).unwrap();
    let sample = layers::merged(&leaves).unwrap();
    assert_eq!(sample, Settings::default());
    for key in layers::known_keys() {
        let mut parts = key.rsplit('.');
        let (last, section) = (parts.next().unwrap(), parts.next().unwrap());
        // What has no default stands in a comment, as `token = …` or `tls = { ca = … }`.
        let is_comment = text.lines().any(|line| {
            line.starts_with("# ")
                && (line.starts_with(&format!("# {last} =")) || line.starts_with(&format!("# {section} =")))
        });
        assert!(is_comment || leaves.iter().any(|leaf| leaf.key == key), "{key} is not in the sample");
    }
}

#[test]
fn ten_mistakes_are_ten_problems_at_their_lines() {
    let settings = r#"
[server]
lisen = "127.0.0.1:1"
admin = "localhost"
grace = "25"
ready_requires = ["fast"]
[lanes.ephemeral]
backend = "nat"
history_bytes = 64
[lanes.durable]
spool_max = 1
[session]
max_inflight = -1
pong_timeout = "54s"
"#;
    let expected = [
        "t.toml:3: unknown setting server.lisen; did you mean server.listen?",
        "t.toml:4: server.admin: \"localhost\" is no address to listen on: write an IP address and a port, such as",
        "t.toml:5: server.grace: \"25\" is no duration: write a whole number and its unit (ms, s, m, h, d), such as",
        "t.toml:6: server.ready_requires: expected \"any\" or lanes such as [\"ephemeral\", \"durable\"], found",
        "t.toml:8: lanes.ephemeral.backend: expected \"memory\" or \"nats\", found \"nat\"",
        "t.toml:9: lanes.ephemeral.history_bytes: expected a string, found 64",
        "t.toml:11: lanes.durable.spool_max: expected a string, found 1",
        "t.toml:13: session.max_inflight: expected a whole number, found -1",
        "t.toml:14: session.pong_timeout: it must be longer than session.ping_interval (default)",
    ];
    let found = told(from_file(settings).unwrap_err());
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found}\n{expected}");
    }

    let routes = r#"[[route]]
topic = "orders.>"
lane = "durable"
retantion = { age = "7d" }
history = 5
[[route]]
topic = "orders..x"
lane = "neither"
[[route]]
name = "b"
lane = "ephemeral"
queue = "many"
nats = "{topic}.x"
[[route]]
topic = "orders.>"
lane = "durable"
outage = "buffer"
publish = ["role:writer"]
"#;
    let directory = TempDir::new().unwrap();
    let found = told(policy::load(&file(&directory, "t.toml", routes)).unwrap_err());
    let lines: Vec<_> = found.iter().map(|problem| problem.split(": ").next().unwrap()).collect();
    let expected = [4, 5, 7, 8, 9, 12, 13, 15, 17, 18].map(|line| format!("t.toml:{line}"));
    assert_eq!(lines, expected, "{found:#?}");
    assert!(found[0].ends_with("unknown key \"retantion\"; did you mean \"retention\"?"), "{found:#?}");
}

#[test]
fn a_later_layer_wins_value_by_value() {
    let directory = TempDir::new().unwrap();
    let first = file(
        &directory,
        "first.toml",
        "[session]\nqueue_messages = 1\nmax_inflight = 1\nmax_subscriptions = 1\nping_interval = \"1s\"\n",
    );
    let second = file(
        &directory,
        "second.toml",
        "session = { max_inflight = 2, max_subscriptions = 2, ping_interval = \"2s\" }",
    );
    let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let settings = config::load(&Sources {
        files: vec![first, second],
        variables: vec![
            variable("TWINSPAN_SESSION__MAX_SUBSCRIPTIONS", "3"),
            variable("TWINSPAN_SESSION__PING_INTERVAL", "3s"),
            variable("SESSION__PING_INTERVAL", "9s"),
        ],
        set: vec!["session.ping_interval=4s".into()],
    })
    .unwrap();
    let session = &settings.session;
    assert_eq!((session.queue_messages, session.max_inflight, session.max_subscriptions), (1, 2, 3));
    assert_eq!(session.ping_interval, Duration::from_secs(4));
    assert_eq!(session.pong_timeout, Duration::from_secs(60));
    let origin = |key| settings.origin(key).to_string();
    assert!(origin("session.queue_messages").ends_with("first.toml:2"));
    assert!(origin("session.max_inflight").ends_with("second.toml:1"));
    assert_eq!(origin("session.max_subscriptions"), "TWINSPAN_SESSION__MAX_SUBSCRIPTIONS");
    assert_eq!(origin("session.ping_interval"), "--set session.ping_interval");
    assert_eq!(origin("session.pong_timeout"), "default");
}

#[test]
fn a_value_typed_in_a_shell_is_toml_or_else_text() {
    let settings = from_set(&[
        "lanes.ephemeral.url=[\"nats://a:1\", \"nats://b:1\"]",
        "lanes.durable.url=pulsar://c:1",
        "server.ready_requires=[\"durable\"]",
        "server.data_dir=2024",
        "server.allow_anonymous=true",
        "session={ max_inflight = 7 }",
    ])
    .unwrap();
    assert_eq!(settings.lanes.ephemeral.url, ["nats://a:1", "nats://b:1"]);
    assert_eq!(settings.lanes.durable.url, ["pulsar://c:1"]);
    assert_eq!(settings.server.ready_requires, config::server::ReadyRequires::Lanes(vec![Lane::Durable]));
    assert_eq!(settings.server.data_dir, Path::new("2024"));
    assert!(settings.server.allow_anonymous);
    assert_eq!(settings.session.max_inflight, 7);
}

#[test]
fn an_unknown_key_is_refused_in_every_layer_with_the_nearest_known_one() {
    let table = [
        (
            "server.listne=1",
            "--set server.listne: unknown setting server.listne; did you mean server.listen?",
        ),
        ("listen=1", "--set listen: unknown setting listen; did you mean server.listen?"),
        ("session.grace=1", "--set session.grace: unknown setting session.grace; did you mean server.grace?"),
        ("colour=blue", "--set colour: unknown setting colour; config/twinspan.toml shows all there are"),
        ("server=1", "--set server: expected a section with keys of its own, found 1"),
        (".listen=1", "--set .listen: unknown setting .listen; did you mean server.listen?"),
        (
            "server.listen.x=1",
            "--set server.listen.x: unknown setting server.listen.x; did you mean server.listen?",
        ),
        ("grace", "--set grace: write --set key=value, such as --set server.grace=10s"),
    ];
    for (set, expected) in table {
        assert_eq!(told(from_set(&[set]).unwrap_err()), [expected]);
    }
    let from_variable = |name: &str, value: &str| {
        config::load(&Sources { variables: vec![(name.into(), value.into())], ..Sources::default() })
    };
    let table = [
        ("TWINSPAN_SERVER__LISEN", "TWINSPAN_SERVER__LISTEN"),
        ("TWINSPAN_LISTEN", "TWINSPAN_SERVER__LISTEN"),
        ("TWINSPAN_SESSION_MAX_INFLIGHT", "TWINSPAN_SESSION__MAX_INFLIGHT"),
    ];
    for (name, meant) in table {
        let expected = format!("{name}: unknown setting {name}; did you mean {meant}?");
        assert_eq!(told(from_variable(name, "1").unwrap_err()), [expected]);
    }
    // What Kubernetes puts into every pod beside a service named twinspan.
    for (name, value) in [
        ("TWINSPAN_SERVICE_HOST", "10.0.0.1"),
        ("TWINSPAN_SERVICE_PORT_WS", "8090"),
        ("TWINSPAN_PORT", "tcp://10.0.0.1:8090"),
        ("TWINSPAN_PORT_8090_TCP_ADDR", "10.0.0.1"),
    ] {
        assert!(from_variable(name, value).is_ok(), "{name}");
    }
    assert!(from_variable("TWINSPAN_PORT", "8090").is_err());
}

#[test]
fn settings_that_do_not_go_together_are_refused_where_they_were_written() {
    let table: [(&[&str], &str); 12] = [
        (&["server.listen=0.0.0.0:1"], "--set server.listen: 0.0.0.0:1 can be reached from other"),
        (&["server.admin=[::]:1"], "--set server.admin: [::]:1 can be reached from other"),
        (&["server.admin=127.0.0.1:8090"], "--set server.admin: 127.0.0.1:8090 is server.listen (default)"),
        (&["session.queue_messages=0"], "--set session.queue_messages: it cannot be zero"),
        (&["lanes.ephemeral.url=http://a"], "--set lanes.ephemeral.url: \"http://a\" is no URL of"),
        (&["lanes.durable.url=[]"], "--set lanes.durable.url: the list is empty"),
        (&["lanes.durable.admin_url=a b"], "--set lanes.durable.admin_url: \"a b\" is no URL"),
        (&["lanes.ephemeral.user=a"], "--set lanes.ephemeral.user: it needs lanes.ephemeral.pass"),
        (&["lanes.ephemeral.tls.ca=/no/such"], "--set lanes.ephemeral.tls.ca: cannot read /no"),
        (
            &["lanes.ephemeral.tls.cert=Cargo.toml"],
            "--set lanes.ephemeral.tls.cert: it needs its key: set lanes.ephemeral.tls.key",
        ),
        (
            &["lanes.durable.tls.key=Cargo.toml"],
            "--set lanes.durable.tls.key: it needs its certificate: set lanes.durable.tls.cert",
        ),
        (
            &["lanes.ephemeral.token.file=Cargo.toml", "lanes.ephemeral.credentials=Cargo.toml"],
            "--set lanes.ephemeral.credentials: lanes.ephemeral.token (--set lanes.",
        ),
    ];
    for (set, expected) in table {
        let found = told(from_set(set).unwrap_err());
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].starts_with(expected), "{found:?}\n{expected}");
    }
    assert!(from_set(&["server.listen=0.0.0.0:1", "server.allow_anonymous=true"]).is_ok());
    assert!(from_set(&["server.listen=[::1]:1"]).is_ok());
    assert!(from_set(&["server.listen=127.0.0.1:0", "server.admin=127.0.0.1:0"]).is_ok());
}

#[test]
fn a_log_format_or_filter_that_is_none_is_refused_where_it_was_written() {
    let found = told(from_file("[log]\nformat = \"text\"\nfilter = \"info,twinspan=loud\"\n").unwrap_err());
    assert_eq!(found.len(), 2, "{found:#?}");
    assert_eq!(found[0], "t.toml:2: log.format: expected \"pretty\" or \"json\", found \"text\"");
    assert!(found[1].starts_with("t.toml:3: log.filter: \"info,twinspan=loud\" is no filter ("), "{found:?}");
    // As a target it would be right, and silence everything.
    let found = told(from_set(&["log.filter=inof"]).unwrap_err());
    assert_eq!(found, ["--set log.filter: \"inof\" is no level; did you mean \"info\"?"]);
    for good in ["off", "WARN", "twinspan::lane=debug,info", "twinspan", "[{topic}]=debug"] {
        assert!(from_set(&[&format!("log.filter={good}")]).is_ok(), "{good}");
    }
}

#[test]
fn rust_log_is_the_filter_where_it_is_set_and_is_held_to_the_same() {
    let with = |value: &str| {
        let variables = vec![
            ("TWINSPAN_LOG__FILTER".to_owned(), "debug".to_owned()),
            ("RUST_LOG".to_owned(), value.to_owned()),
        ];
        config::load(&Sources { variables, set: vec!["log.filter=warn".into()], ..Sources::default() })
    };
    let filter = |value: &str| String::from(with(value).unwrap().log.filter);
    assert_eq!([filter("trace"), filter("")], ["trace", "warn"]);
    assert_eq!(with("trace").unwrap().origin("log.filter").to_string(), "RUST_LOG");
    let found = told(with("debgu").unwrap_err());
    assert_eq!(found, ["RUST_LOG: log.filter: \"debgu\" is no level; did you mean \"debug\"?"]);
}

#[cfg(feature = "otel")]
#[test]
fn a_collector_is_named_by_a_url() {
    let found = |otlp: &str| match from_set(&[&format!("trace.otlp={otlp}")]) {
        Ok(_) => String::new(),
        Err(problems) => told(problems).join("\n"),
    };
    for good in ["http://127.0.0.1:4318", "https://collector.example/otlp/"] {
        assert_eq!(found(good), "");
    }
    for bad in ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://", "http://a/?token=hunter2"] {
        let refused = "--set trace.otlp: it is no URL of a collector, such as http://127.0.0.1:4318";
        assert_eq!(found(bad), refused);
    }
    let found = found("http://me:hunter2@127.0.0.1:4318");
    assert!(
        found.contains("OTEL_EXPORTER_OTLP_HEADERS is for them") && !found.contains("hunter2"),
        "{found}"
    );
}

#[test]
fn a_secret_is_in_a_file_or_a_variable_and_is_never_repeated() {
    let directory = TempDir::new().unwrap();
    let secret = file(&directory, "secret", "hunter2\n");
    let empty = file(&directory, "empty", "\n");
    let refused = [
        "lanes.durable.token=hunter2",
        "lanes.durable.token=[\"hunter2\"]",
        "lanes.durable.token={}",
        "lanes.ephemeral.password=hunter2",
        "lanes.ephemeral.url=nats://me:hunter2@a:1",
        "lanes.durable.token.file=/no/such/file",
        "lanes.durable.token.env=NO_SUCH_VARIABLE",
        &format!("lanes.durable.token.file={}", empty.display()),
    ];
    for set in refused {
        let found = told(from_set(&[set]).unwrap_err());
        assert_eq!(found.len(), 1, "{set}: {found:?}");
        assert!(!found[0].contains("hunter2"), "{found:?}");
    }
    let from_file = format!("lanes.durable.token={{ file = \"{}\" }}", secret.display());
    let settings = from_set(&["lanes.durable.token.env=NO_SUCH_VARIABLE", &from_file]).unwrap();
    assert_eq!(settings.lanes.durable.token.as_ref().unwrap().read().unwrap(), "hunter2");
    assert!(!format!("{settings:?}{:?}", settings.of_lane(Lane::Durable)).contains("hunter2"));
    let both = format!("[lanes.durable.token]\nenv = \"PATH\"\nfile = \"{}\"\n", secret.display());
    let found = told(self::from_file(&both).unwrap_err());
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("t.toml:3: lanes.durable.token: it is at "), "{found:?}");
    // The variable with the secret may begin with our prefix: it is no setting.
    let settings = config::load(&Sources {
        files: vec![file(
            &directory,
            "named.toml",
            "[lanes.durable]\ntoken = { env = \"TWINSPAN_TOKEN\" }\n",
        )],
        variables: vec![("TWINSPAN_TOKEN".into(), "hunter2".into())],
        ..Sources::default()
    });
    let found = told(settings.unwrap_err());
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].contains("the variable TWINSPAN_TOKEN, which should hold a secret, is not set"),
        "{found:?}"
    );
}

#[test]
fn a_file_that_is_not_there_is_an_error_that_says_what_to_do() {
    let found = config::load(&Sources { files: vec!["no/such.toml".into()], ..Sources::default() });
    let found = told(found.unwrap_err());
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("cannot read the settings file no/such.toml: "), "{found:?}");
    let settings = from_set(&["server.routes=no/such.toml"]).unwrap();
    let found = told(config::load_routes(&settings).unwrap_err());
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("--set server.routes: there is no routes file no/such.toml. "), "{found:?}");
    assert!(found[0].ends_with("name another with --set server.routes=FILE"), "{found:?}");
}

#[test]
fn check_reports_the_mistakes_of_settings_and_routes_together() {
    let directory = TempDir::new().unwrap();
    let routes = file(&directory, "routes.toml", "[[route]]\ntopic = \"a\"\n");
    let set = vec!["server.grace=soon".to_owned(), format!("server.routes={}", routes.display())];
    let report = config::check(&Sources { set, ..Sources::default() });
    assert!(!report.is_good());
    let text = report.to_string();
    assert!(text.contains("--set server.grace: \"soon\" is no duration"), "{text}");
    assert!(text.contains("routes.toml:1: this route has no lane"), "{text}");
    assert!(text.ends_with("\n2 problems\n"), "{text}");
}

#[test]
fn explain_names_the_file_and_line_of_options_and_the_variable_of_settings() {
    let variables = vec![("TWINSPAN_LANES__DURABLE__URL".to_owned(), "pulsar://p:6650".to_owned())];
    let settings = config::load(&Sources { variables, ..Sources::default() }).unwrap();
    let routes = config::load_routes(&settings).unwrap();
    let topic = Topic::parse("audit.login").unwrap();
    let text = explain::explain(&routes.table, &topic, |lane| settings.of_lane(lane)).to_string();
    let line = |name: &str| {
        let found = text.lines().find(|line| line.trim_start().starts_with(name));
        found.unwrap_or_else(|| panic!("{name} in {text}")).split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let sample = fs::read_to_string("config/routes.toml").unwrap();
    let at = 1 + sample.lines().position(|line| line.starts_with("retention")).unwrap();
    assert_eq!(line("retention"), format!("retention age 7d, size 1GiB config/routes.toml:{at}"));
    assert_eq!(line("declare"), "declare auto default");
    assert_eq!(line("lanes.durable.url"), "lanes.durable.url pulsar://p:6650 TWINSPAN_LANES__DURABLE__URL");
    assert!(
        line("lanes.durable.backend").starts_with("lanes.durable.backend embedded config/twinspan.toml:")
    );
    assert!(
        text.contains("Where the lane is Pulsar it is the topic persistent://public/default/audit.login"),
        "{text}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Samples with a piece replaced by anything, or by what TOML is made of.
    #[test]
    fn no_text_makes_reading_panic_and_each_refusal_has_its_reason(
        from in 0usize..6000,
        length in 0usize..40,
        piece in r#"(.{0,8}|[\[\]{}="'.,#\n*> a-z0-9]{0,12})"#,
    ) {
        for sample in ["config/routes.toml", "config/twinspan.toml"] {
            let mut text: Vec<char> = fs::read_to_string(sample).unwrap().chars().collect();
            let from = from.min(text.len());
            text.splice(from..(from + length).min(text.len()), piece.chars());
            let text: String = text.into_iter().collect();
            if let Err(problems) = source::read(Path::new("r.toml"), &text, &|_| Err(std::io::ErrorKind::NotFound.into())) {
                prop_assert!(!problems.is_empty());
            }
            for leaf in layers::from_file(Path::new("t.toml"), &text, 0).unwrap_or_default() {
                let key = leaf.key.clone();
                if let Err(problem) = layers::try_alone(leaf) {
                    prop_assert!(!problem.message.is_empty(), "{}", key);
                }
            }
        }
    }
}
