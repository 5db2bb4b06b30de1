//! The command line: one file a subcommand.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

pub mod broker;
pub mod canary;
pub mod chat;
pub mod child;
pub mod cluster;
pub mod demo;
pub mod load;
pub mod metadata;
pub mod migrate;
pub mod probe;
pub mod rebuild;
pub mod serve;
pub mod status;
pub mod token;
pub mod topology;

/// End-to-end encrypted messaging for social platforms: a broker that can read nothing, and its clients.
#[derive(Debug, Parser)]
#[command(name = "sealpost", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Log lines as JSON on stderr. What is logged is chosen by RUST_LOG (default: info for the broker, warn for the rest).
    #[arg(long, global = true)]
    log_json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Chat(Box<chat::ChatArgs>),
    Demo(demo::Args),
    Load(Box<load::Args>),
    Metadata(Box<metadata::Args>),
    Migrate(migrate::Args),
    Probe(probe::Args),
    Rebuild(rebuild::Args),
    Serve(serve::Args),
    Status(status::Args),
    Token(token::Args),
    Topology(topology::Args),
}

/// Threads for short blocking calls, the stores' above all. Tokio's default of 512 buys no speed on a few cores, and each thread
/// keeps an allocator heap of its own: with 19,000 idle devices the process had 61 KB a device with it, and has 17 KB with this.
const BLOCKING_THREADS: usize = 16;

/// Parses the arguments and runs the command.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Over a chat's screen nothing else may be written.
    let level = match cli.command {
        Command::Chat(_) => "off",
        // The store's own steps are noise.
        Command::Serve(_) => "info,fjall=warn,lsm_tree=warn",
        _ => "warn",
    };
    log_to_stderr(cli.log_json, level);
    // Ring for all TLS; choosing twice is harmless.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread().max_blocking_threads(BLOCKING_THREADS).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("the runtime can't start")),
    };
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Chat(args) => chat::run(*args).await,
            Command::Demo(args) => demo::run(args).await,
            Command::Load(args) => load::run(*args).await,
            Command::Metadata(args) => metadata::run(*args).await,
            Command::Migrate(args) => migrate::run(args).await,
            Command::Probe(args) => probe::run(args).await,
            Command::Rebuild(args) => rebuild::run(args).await,
            Command::Serve(args) => serve::run(args).await,
            Command::Status(args) => status::run(args).await,
            Command::Token(args) => token::run(args).await,
            Command::Topology(args) => topology::run(args).await,
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("sealpost: {error:#}");
    ExitCode::FAILURE
}

fn log_to_stderr(json: bool, level: &str) {
    // libsignal logs addresses and ratchet keys: never wanted, unless somebody asks for it by name.
    let quiet = |level: &str| EnvFilter::new(format!("{level},libsignal_protocol_syft=off"));
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(chosen) if chosen.contains("libsignal") => EnvFilter::new(chosen),
        Ok(chosen) if !chosen.is_empty() => quiet(&chosen),
        _ => quiet(level),
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    if json {
        lines.json().init();
    } else {
        lines.init();
    }
}
