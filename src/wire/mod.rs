//! The wire: bytes on the socket, both directions, no I/O.

pub mod code;
pub mod json;
pub mod verbs;
