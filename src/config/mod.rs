//! Settings: the process's own, and each module's, in layers and checked.
//!
//! ```text
//! layers ──taken apart──▶ values ──each tried alone──▶ Settings ──checked together──▶ serve
//!                           └──────────── problems, each with its place ────────┘
//! ```

use std::fmt;
use std::path::{Path, PathBuf};

pub mod checks;
pub mod layers;
pub mod server;
pub mod settings;

use crate::lane::settings::{DurableBackend, EphemeralBackend};
use crate::origin::{Origin, Problem};
use crate::policy::table::RouteTable;
use crate::policy::{self, Loaded};
use layers::{Leaf, SECRETS};
use settings::Settings;

/// Read where no file is named, if it is there.
const DEFAULT_FILE: &str = "config/twinspan.toml";

/// Where settings come from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// `--config`, in order.
    pub files: Vec<PathBuf>,
    /// The environment; only our variables in it are looked at, and `RUST_LOG`.
    pub variables: Vec<(String, String)>,
    /// `--set`, in order.
    pub set: Vec<String>,
}

impl Sources {
    /// What the command line names, and this process's environment.
    pub fn new(files: Vec<PathBuf>, set: Vec<String>) -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        };
        Self { files, variables: std::env::vars_os().filter_map(text).collect(), set }
    }
}

/// The settings, or everything that is wrong in them.
pub fn load(sources: &Sources) -> Result<Settings, Vec<Problem>> {
    match read(sources, Path::new(DEFAULT_FILE)) {
        (settings, problems) if problems.is_empty() => Ok(settings),
        (_, problems) => Err(problems),
    }
}

/// The routes that the settings name, or everything that is wrong in them.
pub fn load_routes(settings: &Settings) -> Result<Loaded, Vec<Problem>> {
    let path = &settings.server.routes;
    if path.exists() {
        return policy::load(path);
    }
    let begin = match settings.files.is_empty() {
        true => format!("there is no settings file {DEFAULT_FILE} here, and no routes file"),
        false => "there is no routes file".to_owned(),
    };
    let message = format!(
        "{begin} {}. It says which topic takes which lane: run where it is, write one, or name another with \
         --set server.routes=FILE",
        path.display()
    );
    Err(vec![Problem::new(settings.origin("server.routes"), message)])
}

/// Reads settings and routes as `serve` would.
pub fn check(sources: &Sources) -> Report {
    let (settings, mut problems) = read(sources, Path::new(DEFAULT_FILE));
    let table = match load_routes(&settings) {
        Ok(loaded) => Some(loaded.table),
        Err(found) => {
            problems.extend(found);
            None
        }
    };
    Report { settings, table, problems }
}

/// The settings as far as they are good, and what is wrong.
fn read(sources: &Sources, default_file: &Path) -> (Settings, Vec<Problem>) {
    let mut problems = Vec::new();
    let files = files(sources, default_file, &mut problems);
    let leaves = collect(sources, &files, &mut problems);
    let leaves = one_place_for_a_secret(leaves, &mut problems);
    let mut good = Vec::new();
    for leaf in leaves {
        match layers::try_alone(leaf) {
            Ok(leaf) => good.push(leaf),
            Err(problem) => problems.push(problem),
        }
    }
    let mut settings = layers::merged(&good).unwrap_or_else(|error| {
        problems.push(Problem::new(Origin::Default, error.to_string()));
        Settings::default()
    });
    settings.origins = good.into_iter().map(|leaf| (leaf.key, leaf.at)).collect();
    settings.files = files.into_iter().map(|(path, _)| path).collect();
    problems.extend(checks::check(&settings));
    problems.sort_by(|a, b| a.at.cmp(&b.at));
    (settings, problems)
}

/// The settings files and their texts.
fn files(sources: &Sources, default_file: &Path, problems: &mut Vec<Problem>) -> Vec<(PathBuf, String)> {
    if sources.files.is_empty() && !default_file.exists() {
        return Vec::new();
    }
    let paths = if sources.files.is_empty() { vec![default_file.to_owned()] } else { sources.files.clone() };
    let mut files = Vec::new();
    for path in paths {
        match std::fs::read_to_string(&path) {
            Ok(text) => files.push((path, text)),
            Err(error) => {
                let message = format!("cannot read the settings file {}: {error}", path.display());
                problems.push(Problem::new(Origin::Default, message));
            }
        }
    }
    files
}

/// The values of all layers, the later the stronger.
fn collect(sources: &Sources, files: &[(PathBuf, String)], problems: &mut Vec<Problem>) -> Vec<Leaf> {
    let mut leaves = Vec::new();
    let mut add = |read: Result<Vec<Leaf>, Problem>| match read {
        Ok(read) => leaves.extend(read),
        Err(problem) => problems.push(problem),
    };
    for (layer, (path, text)) in files.iter().enumerate() {
        add(layers::from_file(path, text, layer));
    }
    for (name, value) in &sources.variables {
        add(Ok(layers::from_variable(name, value, files.len())));
    }
    for (at, text) in sources.set.iter().enumerate() {
        add(layers::from_argument(text, files.len() + 1 + at));
    }
    let last = files.len() + 1 + sources.set.len();
    let log = sources.variables.iter().find_map(|(name, value)| layers::from_log_variable(name, value, last));
    add(Ok(log.into_iter().collect()));
    // A variable that holds a secret may have our prefix without being a setting.
    let holders: Vec<_> = leaves.iter().filter_map(secret_variable).collect();
    leaves.retain(|leaf| !holders.contains(&leaf.at));
    leaves
}

/// The variable that this value says a secret is in.
fn secret_variable(leaf: &Leaf) -> Option<Origin> {
    let secret = leaf.key.strip_suffix(".env")?;
    let variable = leaf.value.as_str().filter(|_| SECRETS.contains(&secret))?;
    Some(Origin::Variable(variable.into()))
}

/// A secret is in a file or in a variable: the later layer's place replaces the earlier one's, where other settings
/// would be merged.
fn one_place_for_a_secret(leaves: Vec<Leaf>, problems: &mut Vec<Problem>) -> Vec<Leaf> {
    let secret = |leaf: &Leaf| {
        let (key, _) = leaf.key.rsplit_once('.')?;
        SECRETS.contains(&key).then(|| key.to_owned())
    };
    let mut kept: Vec<Leaf> = Vec::new();
    for leaf in leaves {
        if let Some(key) = secret(&leaf) {
            let other = |earlier: &Leaf| secret(earlier).as_ref() == Some(&key) && earlier.key != leaf.key;
            if let Some(twin) = kept.iter().find(|earlier| other(earlier) && earlier.layer == leaf.layer) {
                let message = format!("{key}: it is at {} already, and can be in one place only", twin.at);
                problems.push(Problem::new(leaf.at.clone(), message));
            }
            kept.retain(|earlier| !other(earlier));
        }
        kept.push(leaf);
    }
    kept
}

/// What `check` found.
pub struct Report {
    pub settings: Settings,
    pub table: Option<RouteTable>,
    pub problems: Vec<Problem>,
}

impl Report {
    pub fn is_good(&self) -> bool {
        self.problems.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            writeln!(f, "{problem}")?;
        }
        let (true, Some(table)) = (self.problems.is_empty(), &self.table) else {
            let count = self.problems.len();
            return writeln!(f, "{count} problem{}", if count == 1 { "" } else { "s" });
        };
        let Settings { server, lanes, .. } = &self.settings;
        writeln!(f, "Settings and routes are good.\n")?;
        writeln!(f, "  clients    {}", server.listen)?;
        writeln!(f, "  operators  {}", server.admin)?;
        match lanes.ephemeral.backend {
            EphemeralBackend::Memory => writeln!(f, "  ephemeral  in this process")?,
            EphemeralBackend::Nats => writeln!(f, "  ephemeral  NATS at {}", lanes.ephemeral.url.join(" "))?,
        }
        match lanes.durable.backend {
            DurableBackend::Embedded => {
                writeln!(f, "  durable    embedded log in {}", server.data_dir.display())?
            }
            DurableBackend::Pulsar => writeln!(f, "  durable    Pulsar at {}", lanes.durable.url.join(" "))?,
        }
        writeln!(f, "\n  routes, the first that matches wins")?;
        let width = table.routes().iter().map(|route| route.pattern.as_str().len()).max().unwrap_or(0);
        for (route, written) in table.entries() {
            let (pattern, lane) = (route.pattern.as_str(), route.lane.as_str());
            writeln!(f, "  {pattern:width$}  {lane:9}  {}  ({})", written.route, route.name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_neither_settings_nor_routes_are_it_says_so() {
        let nowhere = Path::new("no/such/twinspan.toml");
        let set = vec!["server.routes=no/such/routes.toml".to_owned()];
        let (settings, problems) = read(&Sources { set, ..Sources::default() }, nowhere);
        assert_eq!(problems, []);
        let found = load_routes(&settings).err().unwrap();
        assert_eq!(found.len(), 1);
        assert!(
            found[0].to_string().contains(
                "there is no settings file config/twinspan.toml here, and no routes file no/such/routes.toml."
            ),
            "{}",
            found[0]
        );
    }
}
