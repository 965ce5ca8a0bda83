use std::process::ExitCode;

use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    twinspan::cli::run(twinspan::cli::Arguments::parse()).await
}
