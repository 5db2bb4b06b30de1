//! `sealpost chat`: a conversation in the terminal, or, without one, line by line.

mod account;
mod app;
mod command;
mod plain;
mod text;
mod tui;
mod view;

use std::io::IsTerminal as _;
use std::path::PathBuf;

use crate::ids::Identity;

/// A realm's token; never printed.
#[derive(Clone)]
pub struct Token(String);

impl std::str::FromStr for Token {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Talks to people from the terminal: end-to-end encrypted, with history, ticks and safety numbers.
#[derive(Debug, Clone, clap::Args)]
pub struct ChatArgs {
    /// Who you are: `user@realm`. A broker in development mode believes it; another one wants a token.
    #[arg(long = "as", value_name = "IDENTITY")]
    pub identity: Identity,
    /// The broker.
    #[arg(long, env = "SEALPOST_SERVER", default_value = "http://127.0.0.1:8470")]
    pub server: String,
    /// Certificates (PEM) of the authority that vouches for the broker, if it is not a public one.
    #[arg(long, env = "SEALPOST_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// The name of this device; another name is another device of the same account.
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// Where keys and history are kept [default: ~/.local/share/sealpost].
    #[arg(long, env = "SEALPOST_CLIENT_DATA", value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Whom to talk to first: `user@realm`.
    #[arg(long, value_name = "IDENTITY")]
    pub to: Option<Identity>,
    /// A token of the realm's identity provider, to register this device with. Not needed in development mode.
    #[arg(long, env = "SEALPOST_TOKEN", hide_env_values = true, value_name = "JWT")]
    pub token: Option<Token>,
    /// Registers this device anew; what was there is kept beside it, under another name.
    #[arg(long)]
    pub fresh: bool,
    /// Lines instead of a screen: what you type is sent to --to, what happens is printed. So it is without a terminal.
    #[arg(long)]
    pub plain: bool,
    /// As --plain, but what happens is printed as JSON, one object a line.
    #[arg(long)]
    pub json: bool,
    /// At the end of the input go on printing until interrupted, instead of ending once everything is sent.
    #[arg(long)]
    pub follow: bool,
}

/// Runs until the person leaves.
pub async fn run(args: ChatArgs) -> anyhow::Result<()> {
    let client = account::open(&args).await?;
    client.start();
    let outcome = if args.plain || args.json || !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        plain::run(&client, &args).await
    } else {
        tui::run(&client, &args).await
    };
    client.close().await;
    outcome
}
