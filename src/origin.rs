//! Where a value was written, and what is wrong with it there.
//!
//! Settings come in layers and routes from a file, and both answer the same two questions: "who said this?" and
//! "what must I change?". A problem names its place first, so that an editor or a terminal can jump there.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use toml_edit::Document;

/// The place where a value was written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Origin {
    /// Nobody wrote it.
    #[default]
    Default,
    File {
        path: Arc<Path>,
        line: usize,
    },
    /// A variable of the environment.
    Variable(Arc<str>),
    /// `--set` with this key.
    Argument(Arc<str>),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Variable(name) => f.write_str(name),
            Origin::Argument(key) => write!(f, "--set {key}"),
        }
    }
}

/// One thing that is wrong in what people wrote: where, and a sentence that says what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `Default` where something is wrong with nothing having been written.
    pub at: Origin,
    pub message: String,
}

impl Problem {
    pub fn new(at: Origin, message: impl Into<String>) -> Self {
        Self { at, message: message.into() }
    }

    /// Something wrong with one key; `--set key` says by itself which.
    pub fn of_key(at: Origin, key: &str, why: impl fmt::Display) -> Self {
        match &at {
            Origin::Argument(set) if **set == *key => Self::new(at, why.to_string()),
            _ => Self::new(at, format!("{key}: {why}")),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            Origin::Default => f.write_str(&self.message),
            at => write!(f, "{at}: {}", self.message),
        }
    }
}

/// A TOML file that parsed, and the lines in it.
pub struct Source {
    path: Arc<Path>,
    document: Document<String>,
}

impl Source {
    pub fn parse(path: &Path, text: &str) -> Result<Self, Problem> {
        let path: Arc<Path> = path.into();
        // A byte order mark is what some editors leave; it is no part of the text.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        match Document::parse(text.to_owned()) {
            Ok(document) => Ok(Self { path, document }),
            Err(error) => {
                let line = line_of(text, error.span().map_or(0, |span| span.start));
                let message = format!("this is not TOML: {}", error.message().replace('\n', "; "));
                Err(Problem::new(Origin::File { path, line }, message))
            }
        }
    }

    pub fn root(&self) -> &toml_edit::Table {
        self.document.as_table()
    }

    pub fn path(&self) -> &Arc<Path> {
        &self.path
    }

    /// The place of a key or a value, by the bytes it spans.
    pub fn at(&self, span: Option<std::ops::Range<usize>>) -> Origin {
        let line = line_of(self.document.raw(), span.map_or(0, |span| span.start));
        Origin::File { path: self.path.clone(), line }
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

/// The known name that somebody may have meant; none where nothing is near.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let allowed = (name.len() / 3).max(1);
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_known_name_is_offered_where_one_is_near() {
        let known = ["retention", "retain", "name", "topic"];
        for (written, meant) in [
            ("retantion", Some("retention")),
            ("nmae", Some("name")),
            ("topics", Some("topic")),
            ("zebra", None),
        ] {
            assert_eq!(nearest(written, known), meant, "{written}");
        }
    }

    #[test]
    fn what_is_not_toml_is_reported_at_its_line() {
        let problem = Source::parse(Path::new("a.toml"), "a = 1\nb = \n").err().unwrap().to_string();
        assert!(problem.starts_with("a.toml:2: this is not TOML: "), "{problem}");
        assert!(Source::parse(Path::new("a.toml"), "\u{feff}a = 1\r\nb = 2\r\n").is_ok());
    }
}
