//! What is wrong with settings or routes, as one error for the terminal.

use crate::origin::Problem;

pub fn as_error(problems: &[Problem]) -> anyhow::Error {
    let lines: Vec<_> = problems.iter().map(|problem| format!("\n  {problem}")).collect();
    anyhow::anyhow!("the settings or routes have {} problems:{}", lines.len(), lines.concat())
}
