//! Routes change while messages flow, and a mistake changes nothing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use twinspan::message::Lanes;
use twinspan::policy::{self, Reloader};
use twinspan::telemetry::metrics::Metrics;

/// Long enough for a machine that is busy, and shorter than the looks that would hide a watch that does not work.
const PATIENCE: Duration = Duration::from_secs(20);

fn file(directory: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, text).unwrap();
    path
}

const EPHEMERAL: &str = "[[route]]\ntopic = \"a\"\nlane = \"ephemeral\"\n";
const DURABLE: &str = "[[route]]\ntopic = \"a\"\nlane = \"durable\"\n";
const BAD: &str = "[[route]]\ntopic = \"a\"\nlain = \"durable\"\n";

struct Watched {
    directory: TempDir,
    reloader: Reloader,
    metrics: Arc<Metrics>,
    _task: AbortOnDropHandle<()>,
}

impl Watched {
    /// Watches `routes.toml`, once `prepare` has put it there.
    fn new(prepare: impl FnOnce(&TempDir)) -> Self {
        let directory = TempDir::new().unwrap();
        prepare(&directory);
        let path = directory.path().join("routes.toml");
        let metrics = Arc::new(Metrics::new());
        let reloader = Reloader::new(path.clone(), policy::load(&path).unwrap(), metrics.clone());
        let task = tokio::spawn(reloader.clone().watch(CancellationToken::new()));
        Self { directory, reloader, metrics, _task: AbortOnDropHandle::new(task) }
    }

    fn written() -> Self {
        Self::new(|directory| drop(file(directory, "routes.toml", EPHEMERAL)))
    }

    fn lane(&self) -> Lanes {
        self.reloader.policy().table().routes()[0].lane
    }

    async fn until(&self, what: &str, reached: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !reached(self) {
            assert!(Instant::now() < deadline, "{what} did not come: {:?}", self.reloader.last_reload());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn a_file_written_in_place_is_reloaded_each_time() {
    let watched = Watched::written();
    let mut changes = watched.reloader.policy().changes();
    // The first may be seen by the look at the start, the second only by the watch.
    for (text, lane) in [(DURABLE, Lanes::DURABLE), (EPHEMERAL, Lanes::EPHEMERAL)] {
        file(&watched.directory, "routes.toml", text);
        tokio::time::timeout(PATIENCE, changes.changed()).await.unwrap().unwrap();
        assert_eq!(watched.lane(), lane);
    }
}

#[tokio::test]
async fn a_file_renamed_over_the_old_one_is_reloaded_each_time() {
    let watched = Watched::written();
    for (text, lane) in [(DURABLE, Lanes::DURABLE), (EPHEMERAL, Lanes::EPHEMERAL), (DURABLE, Lanes::DURABLE)]
    {
        let new = file(&watched.directory, "routes.toml.new", text);
        fs::rename(new, watched.directory.path().join("routes.toml")).unwrap();
        watched.until("the new lane", |watched| watched.lane() == lane).await;
    }
}

#[tokio::test]
async fn a_link_swapped_as_kubernetes_does_is_reloaded_each_time() {
    let version = |directory: &TempDir, name: &str, text: &str| {
        let path = directory.path().join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("routes.toml"), text).unwrap();
        symlink(name, directory.path().join("..data_tmp")).unwrap();
        fs::rename(directory.path().join("..data_tmp"), directory.path().join("..data")).unwrap();
    };
    let watched = Watched::new(|directory| {
        version(directory, "..1", EPHEMERAL);
        symlink("..data/routes.toml", directory.path().join("routes.toml")).unwrap();
    });
    for (name, before, text, lane) in
        [("..2", "..1", DURABLE, Lanes::DURABLE), ("..3", "..2", EPHEMERAL, Lanes::EPHEMERAL)]
    {
        version(&watched.directory, name, text);
        fs::remove_dir_all(watched.directory.path().join(before)).unwrap();
        watched.until("the new lane", |watched| watched.lane() == lane).await;
    }
}

#[tokio::test]
async fn a_bad_file_leaves_the_routes_in_force_and_says_so_until_a_good_one_heals_it() {
    let watched = Watched::written();
    let generation = *watched.reloader.policy().changes().borrow();
    let success =
        |watched: &Watched| watched.metrics.render().contains("\ntwinspan_config_last_reload_success 1\n");
    assert!(watched.reloader.last_reload().ok && success(&watched));

    let in_force = |watched: &Watched| (watched.lane(), *watched.reloader.policy().changes().borrow());
    for bad in [BAD, "", "[[route]]\ntopic = \"a\"\nlane = \"dur"] {
        file(&watched.directory, "routes.toml", bad);
        watched.until("the refusal", |watched| !watched.reloader.last_reload().ok).await;
        assert!(watched.reloader.reload().is_err());
        assert!(!success(&watched));
        assert_eq!(in_force(&watched), (Lanes::EPHEMERAL, generation));
        assert!(!watched.reloader.last_reload().problems.is_empty());
    }
    file(&watched.directory, "routes.toml", BAD);
    let heard =
        |watched: &Watched| watched.reloader.last_reload().problems.iter().any(|p| p.contains("lain"));
    watched.until("the sentence", heard).await;

    fs::remove_file(watched.directory.path().join("routes.toml")).unwrap();
    let gone = |watched: &Watched| watched.reloader.last_reload().problems[0].contains("cannot read");
    watched.until("that it is gone", gone).await;
    assert_eq!(in_force(&watched), (Lanes::EPHEMERAL, generation));

    file(&watched.directory, "routes.toml", EPHEMERAL);
    watched.until("health", |watched| watched.reloader.last_reload().ok && success(watched)).await;
    assert_eq!(in_force(&watched), (Lanes::EPHEMERAL, generation), "the same routes are no change");

    file(&watched.directory, "routes.toml", DURABLE);
    watched.until("the new lane", |watched| watched.lane() == Lanes::DURABLE).await;
}

#[test]
fn a_reload_that_was_asked_for_tells_what_changed() {
    let directory = TempDir::new().unwrap();
    let route = |topic: &str, lane: &str| format!("[[route]]\ntopic = \"{topic}\"\nlane = \"{lane}\"\n");
    let path = file(&directory, "routes.toml", &(route("a", "durable") + &route("b", "durable")));
    let reloader = Reloader::new(path.clone(), policy::load(&path).unwrap(), Arc::new(Metrics::new()));
    let changes = reloader.policy().changes();
    assert_eq!(reloader.reload().unwrap().to_string(), "2 routes, none changed");
    let moved = "# only lines move\n".to_owned() + &route("b", "durable") + &route("a", "durable");
    file(&directory, "routes.toml", &moved);
    assert_eq!(reloader.reload().unwrap().to_string(), "2 routes, none changed");
    assert!(!changes.has_changed().unwrap());
    let (_, written) =
        reloader.policy().table().entries().next().map(|(r, w)| (r.clone(), w.clone())).unwrap();
    assert!(written.route.to_string().ends_with("routes.toml:5"), "explain goes with the file");
    file(&directory, "routes.toml", &(route("a", "ephemeral") + &route("c", "durable")));
    assert_eq!(reloader.reload().unwrap().to_string(), "2 routes, added c, changed a, removed b");
    assert!(changes.has_changed().unwrap());
}

#[tokio::test]
async fn a_schema_that_alone_has_changed_is_reloaded_and_a_bad_one_leaves_the_routes_in_force() {
    let schema = |directory: &TempDir, text: &str| drop(file(directory, "schemas/a.json", text));
    let watched = Watched::new(|directory| {
        fs::create_dir(directory.path().join("schemas")).unwrap();
        schema(directory, "{}");
        file(directory, "routes.toml", &(EPHEMERAL.to_owned() + "schema = \"schemas/a.json\"\n"));
    });
    let takes = |watched: &Watched, payload: &str| {
        let table = watched.reloader.policy().table();
        table.routes()[0].schema.as_ref().unwrap().check(payload.as_bytes()).is_ok()
    };
    assert!(takes(&watched, "7"));
    for (text, taken) in [(r#"{"type":"string"}"#, "\"a\""), (r#"{"type":"array"}"#, "[]")] {
        schema(&watched.directory, text);
        watched.until("the new schema", |watched| takes(watched, taken) && !takes(watched, "7")).await;
    }
    schema(&watched.directory, r#"{"type":"arrray"}"#);
    watched.until("the refusal", |watched| !watched.reloader.last_reload().ok).await;
    let told = watched.reloader.last_reload().problems.join("\n");
    assert!(told.contains("routes.toml:4: schema: schemas/a.json is no JSON Schema: at \"/type\""), "{told}");
    assert!(takes(&watched, "[]") && !takes(&watched, "7"));
    fs::remove_file(watched.directory.path().join("schemas/a.json")).unwrap();
    let gone = |watched: &Watched| watched.reloader.last_reload().problems[0].contains("schema: cannot read");
    watched.until("that it is gone", gone).await;
    assert!(takes(&watched, "[]"));
}
