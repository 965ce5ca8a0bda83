//! The layers of the settings, taken apart into single values.
//!
//! ```text
//! defaults ◂ --config FILE … ◂ TWINSPAN_… ◂ --set key=value ◂ RUST_LOG        a later layer wins, value by value
//! ```
//! Each value is a figment provider of its own and is tried alone on the defaults: one that is wrong is reported at
//! the place where it was written, and hides no other.

use std::path::Path;

use figment::error::{Actual, Kind};
use figment::providers::Serialized;
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use toml_edit::{Item, TableLike};

use super::settings::Settings;
use crate::origin::{Origin, Problem, Source, nearest};
use crate::telemetry::log;

pub const VARIABLE_PREFIX: &str = "TWINSPAN_";
pub const SECRETS: [&str; 3] = ["lanes.ephemeral.token", "lanes.ephemeral.password", "lanes.durable.token"];

/// One value of one layer.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// Such as `server.listen`.
    pub key: String,
    pub value: Value,
    pub at: Origin,
    /// Which layer said it, the later the higher.
    pub layer: usize,
    /// The value as it was typed, where it was not typed in a file. TOML reads `user=007` as a number.
    typed: Option<String>,
}

impl Provider for &Leaf {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.at.to_string())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let nest = |inner: Value, name: &str| Value::from(Dict::from([(name.to_owned(), inner)]));
        let nested = self.key.rsplit('.').fold(self.value.clone(), nest);
        Ok(Profile::Default.collect(nested.into_dict().unwrap_or_default()))
    }
}

pub fn from_file(path: &Path, text: &str, layer: usize) -> Result<Vec<Leaf>, Problem> {
    let source = Source::parse(path, text)?;
    let mut leaves = Vec::new();
    flatten(
        source.root(),
        "",
        layer,
        &|table, key| source.at(table.key(key).and_then(|key| key.span())),
        &mut leaves,
    );
    Ok(leaves)
}

/// `TWINSPAN_SERVER__LISTEN` is `server.listen`.
pub fn from_variable(name: &str, value: &str, layer: usize) -> Vec<Leaf> {
    let Some(key) = name.strip_prefix(VARIABLE_PREFIX) else {
        return Vec::new();
    };
    if is_service_link(name, value) {
        return Vec::new();
    }
    typed(&key.to_lowercase().replace("__", "."), value, Origin::Variable(name.into()), layer)
}

/// `RUST_LOG` is `log.filter`, and the last to say so.
pub fn from_log_variable(name: &str, value: &str, layer: usize) -> Option<Leaf> {
    (name == log::VARIABLE && !value.is_empty()).then(|| Leaf {
        key: "log.filter".into(),
        value: value.into(),
        at: Origin::Variable(name.into()),
        layer,
        typed: None,
    })
}

/// `server.listen=127.0.0.1:8090`, from the command line.
pub fn from_argument(text: &str, layer: usize) -> Result<Vec<Leaf>, Problem> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => {
            let key = key.trim();
            Ok(typed(key, value.trim(), Origin::Argument(key.into()), layer))
        }
        _ => Err(Problem::new(
            Origin::Argument(text.into()),
            "write --set key=value, such as --set server.grace=10s",
        )),
    }
}

/// Kubernetes tells every pod where each service is. For a service named `twinspan` these variables have our prefix.
fn is_service_link(name: &str, value: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.contains("_PORT_")
        || (name.ends_with("_PORT") && value.contains("://"))
}

fn typed(key: &str, text: &str, at: Origin, layer: usize) -> Vec<Leaf> {
    let value = text.parse::<toml_edit::Value>();
    let mut leaves = Vec::new();
    match value.as_ref().map(toml_edit::Value::as_inline_table) {
        Ok(Some(table)) if !table.is_empty() => {
            flatten(table, &format!("{key}."), layer, &|_, _| at.clone(), &mut leaves);
        }
        _ => {
            let read = value.map_or_else(|_| text.into(), |value| value_of(&value));
            leaves.push(Leaf { key: key.to_owned(), value: read, at, layer, typed: Some(text.to_owned()) });
        }
    }
    leaves
}

fn flatten(
    table: &dyn TableLike,
    prefix: &str,
    layer: usize,
    at: &dyn Fn(&dyn TableLike, &str) -> Origin,
    leaves: &mut Vec<Leaf>,
) {
    for (name, item) in table.iter() {
        let key = format!("{prefix}{name}");
        match item.as_table_like() {
            Some(inner) if !inner.is_empty() => flatten(inner, &format!("{key}."), layer, at, leaves),
            _ => leaves.push(Leaf { key, value: item_value(item), at: at(table, name), layer, typed: None }),
        }
    }
}

fn item_value(item: &Item) -> Value {
    match item {
        Item::Value(value) => value_of(value),
        Item::ArrayOfTables(tables) => Value::from(tables.iter().map(|_| Dict::new()).collect::<Vec<_>>()),
        // What has keys was taken apart; what is left is empty.
        Item::Table(_) | Item::None => Value::from(Dict::new()),
    }
}

fn value_of(value: &toml_edit::Value) -> Value {
    match value {
        toml_edit::Value::String(text) => text.value().as_str().into(),
        toml_edit::Value::Integer(number) => (*number.value()).into(),
        toml_edit::Value::Float(number) => (*number.value()).into(),
        toml_edit::Value::Boolean(flag) => (*flag.value()).into(),
        toml_edit::Value::Datetime(time) => time.value().to_string().into(),
        toml_edit::Value::Array(values) => values.iter().map(value_of).collect::<Vec<_>>().into(),
        toml_edit::Value::InlineTable(table) => {
            table.iter().map(|(key, value)| (key.to_owned(), value_of(value))).collect::<Dict>().into()
        }
    }
}

/// Tries one value alone. The answer is the value as the settings take it.
pub fn try_alone(mut leaf: Leaf) -> Result<Leaf, Problem> {
    if SECRETS.contains(&leaf.key.as_str()) {
        // Whatever stands there may be the secret itself: it is not repeated.
        let why = "a secret does not stand in the settings: put it in a file or a variable, and write \
                   { file = \"…\" } or { env = \"…\" }";
        return Err(Problem::of_key(leaf.at, &leaf.key, why));
    }
    let Err(error) = merged([&leaf]) else {
        return Ok(leaf);
    };
    if let Some(typed) = &leaf.typed {
        let as_text = Leaf { value: typed.as_str().into(), ..leaf.clone() };
        if merged([&as_text]).is_ok() {
            leaf.value = as_text.value;
            return Ok(leaf);
        }
    }
    Err(problem(leaf, *error))
}

/// The defaults and then these values, the later the stronger.
pub fn merged<'a>(leaves: impl IntoIterator<Item = &'a Leaf>) -> Result<Settings, Box<figment::Error>> {
    let defaults = Figment::from(Serialized::defaults(Settings::default()));
    leaves.into_iter().fold(defaults, |figment, leaf| figment.merge(leaf)).extract().map_err(Box::new)
}

fn problem(leaf: Leaf, error: figment::Error) -> Problem {
    let is_last = |name: &str| leaf.key.rsplit('.').next() == Some(name);
    let why = match error.kind {
        Kind::UnknownField(..) => return unknown(leaf),
        Kind::UnknownVariant(name, _) if is_last(&name) => return unknown(leaf),
        // The key goes on below a value.
        Kind::InvalidType(Actual::Map, _) if leaf.value.as_dict().is_none() => return unknown(leaf),
        Kind::UnknownVariant(name, known) => {
            let known: Vec<_> = known.iter().map(|known| format!("{known:?}")).collect();
            format!("expected {}, found {name:?}", known.join(" or "))
        }
        Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected) => {
            let expected = match expected.as_str() {
                "usize" | "u64" => "a whole number",
                "a boolean" => "true or false",
                section if section.starts_with("struct ") => "a section with keys of its own",
                other => other,
            };
            format!("expected {expected}, found {}", found_value(&found))
        }
        other => other.to_string(),
    };
    Problem::of_key(leaf.at, &leaf.key, why)
}

fn found_value(found: &Actual) -> String {
    match found {
        Actual::Str(text) => format!("{text:?}"),
        Actual::Bool(flag) => flag.to_string(),
        Actual::Unsigned(number) => number.to_string(),
        Actual::Signed(number) => number.to_string(),
        Actual::Float(number) => number.to_string(),
        Actual::Seq => "a list".to_owned(),
        Actual::Map => "a table".to_owned(),
        other => other.to_string(),
    }
}

/// An unknown key, with the known one that is nearest: as a whole, or by its last part (`listen`, `server.grce`).
fn unknown(leaf: Leaf) -> Problem {
    let known = known_keys();
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let meant = nearest(&leaf.key, known.iter().map(String::as_str)).map(str::to_owned).or_else(|| {
        let names: Vec<_> = known.iter().map(|key| last(key)).collect();
        let near = nearest(&last(&leaf.key), names.iter().map(String::as_str))?;
        known.iter().find(|key| last(key) == near).cloned()
    });
    let spelled = |key: &str| match leaf.at {
        Origin::Variable(_) => format!("{VARIABLE_PREFIX}{}", key.to_uppercase().replace('.', "__")),
        _ => key.to_owned(),
    };
    let message = match meant {
        Some(meant) => format!("unknown setting {}; did you mean {}?", spelled(&leaf.key), spelled(&meant)),
        None => format!("unknown setting {}; config/twinspan.toml shows all there are", spelled(&leaf.key)),
    };
    Problem::new(leaf.at, message)
}

/// Every setting there is.
pub fn known_keys() -> Vec<String> {
    fn collect(dict: &Dict, prefix: &str, keys: &mut Vec<String>) {
        for (name, value) in dict {
            let key = format!("{prefix}{name}");
            match value.as_dict() {
                Some(inner) => collect(inner, &format!("{key}."), keys),
                None => keys.push(key),
            }
        }
    }
    let mut keys = Vec::new();
    // Plain data serializes; if it did not, only the suggestions would be missing.
    if let Ok(Value::Dict(_, defaults)) = Value::serialize(Settings::default()) {
        collect(&defaults, "", &mut keys);
    }
    let inside = |key: &String| -> Vec<String> {
        let names: &[&str] = match key.as_str() {
            secret if SECRETS.contains(&secret) => &["file", "env"],
            "lanes.ephemeral.tls" => &["ca", "cert", "key"],
            "lanes.durable.tls" => &["ca"],
            _ => return vec![key.clone()],
        };
        names.iter().map(|name| format!("{key}.{name}")).collect()
    };
    keys.iter().flat_map(inside).collect()
}
