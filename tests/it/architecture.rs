//! The order of `lib.rs` holds: each module uses only those above it, and a broker's crate is named in its lane alone.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Every source file with its text, without comments and without its unit tests.
fn sources() -> Vec<(PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut found, mut folders) = (Vec::new(), vec![src.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]").next().unwrap();
                let code = code
                    .lines()
                    .filter(|line| !line.trim_start().starts_with("//"))
                    .collect::<Vec<_>>()
                    .join("\n");
                found.push((path.strip_prefix(&src).unwrap().to_owned(), code));
            }
        }
    }
    found
}

/// The names that follow `before` in the text: `crate::a` and `crate::{a, b::c}` both name `a`.
fn named_after<'a>(code: &'a str, before: &str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices(before) {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &code[at + before.len()..];
        let name = |text: &'a str| text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
        match rest.strip_prefix('{') {
            Some(list) => {
                let mut depth = 0;
                let mut begin = 0;
                for (i, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => {
                            names.push(name(list[begin..i].trim()));
                            break;
                        }
                        '}' => depth -= 1,
                        ',' if depth == 0 => {
                            names.push(name(list[begin..i].trim()));
                            begin = i + 1;
                        }
                        _ => {}
                    }
                }
            }
            None => names.push(name(rest)),
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

#[test]
fn each_module_uses_only_those_above_it_in_lib_rs() {
    let lib = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let order: HashMap<&str, usize> = lib
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .enumerate()
        .map(|(at, name)| (name, at))
        .collect();
    assert!(order.len() > 10, "lib.rs lists the modules");
    for (file, code) in sources() {
        let first = file.components().next().unwrap().as_os_str().to_str().unwrap();
        let module = first.strip_suffix(".rs").unwrap_or(first);
        if module == "lib" || module == "main" {
            continue;
        }
        let own = order.get(module).unwrap_or_else(|| panic!("{module} is in lib.rs"));
        for used in named_after(&code, "crate::") {
            let other =
                order.get(used).unwrap_or_else(|| panic!("{}: crate::{used} is no module", file.display()));
            assert!(other <= own, "{}: uses {used}, which stands below {module} in lib.rs", file.display());
        }
    }
}

#[test]
fn the_files_of_a_folder_never_use_its_mod_rs() {
    let files = sources();
    for (file, code) in &files {
        if file.components().count() < 2 || file.ends_with("mod.rs") {
            continue;
        }
        let folder = file.parent().unwrap();
        for used in named_after(code, "super::") {
            let is_a_file = files.iter().any(|(other, _)| {
                *other == folder.join(format!("{used}.rs")) || *other == folder.join(used).join("mod.rs")
            });
            assert!(is_a_file || used == "super", "{}: `super::{used}` lives in mod.rs", file.display());
        }
    }
}

#[test]
fn a_brokers_crate_is_named_in_its_lane_alone() {
    for (file, code) in sources() {
        let file = file.to_str().unwrap();
        let names =
            |krate: &str| code.contains(&format!("{krate}::")) || code.contains(&format!("use {krate}"));
        assert!(!names("async_nats") || file.starts_with("lane/nats"), "{file} names async_nats");
        let opentelemetry = code.contains("opentelemetry") && file != "telemetry/otlp.rs";
        assert!(!opentelemetry, "{file} names opentelemetry, which only a feature brings");
        let pulsar = named_after(&code, "pulsar::").iter().any(|name| !code.contains(&format!("mod {name}")));
        let is_own = code.contains("pub mod pulsar") || code.contains("super::pulsar");
        assert!(!pulsar || is_own || file.starts_with("lane/pulsar"), "{file} names pulsar");
    }
}
