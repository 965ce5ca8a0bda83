//! How deep JSON is nested, and how deep it may be.

/// How deep a JSON payload may be nested. The limit protects the parsers of subscribers; what native clients nest
/// deeper is delivered as text.
pub const DEPTH_MAX: usize = 128;

/// How deep brackets are nested in valid JSON.
pub fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}
