//! How deep JSON is nested, and how deep it may be.

/// How deep a JSON payload may be nested. The limit protects the parsers of subscribers; what native clients nest
/// deeper is delivered as text.
pub const DEPTH_MAX: usize = 128;

/// How deep brackets are nested in valid JSON.
pub fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut at) = (0_usize, 0, 0);
    while let Some(byte) = json.get(at) {
        at += 1;
        match byte {
            b'"' => at += string(&json[at..]),
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// The length of a string with its closing quote. Most of what is published is in strings, so they are searched and not
/// looked at byte by byte.
fn string(json: &[u8]) -> usize {
    let mut at = 0;
    while let Some(found) = memchr::memchr2(b'"', b'\\', json.get(at..).unwrap_or_default()) {
        at += found;
        match json[at] {
            b'"' => return at + 1,
            _ => at += 2,
        }
    }
    json.len()
}
