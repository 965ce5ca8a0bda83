//! The README names every error and close code that a client can see.

use twinspan::wire::code::{Close, Code};

#[test]
fn the_readme_lists_every_error_and_close_code() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let (_, errors) = readme.split_once("## Errors").unwrap();
    let errors = errors.split("\n## ").next().unwrap();
    for code in Code::ALL {
        assert!(errors.contains(&format!("`{code}`")), "{code}");
    }
    let closes = [
        Close::GoingAway,
        Close::Protocol,
        Close::Binary,
        Close::InvalidUtf8,
        Close::TooBig,
        Close::Internal,
        Close::SlowConsumer,
        Close::Silent,
    ];
    for close in closes {
        assert!(errors.contains(&close.code().to_string()), "{close:?}");
    }
}
