//! `sealpost migrate`: makes the keyspaces and tables of a CQL store.

use anyhow::Context as _;

use super::broker::BrokerArgs;
use crate::config::Cql;
use crate::server::cql_options;
use crate::store::cql::{Replication, migrate};

/// Makes keyspaces and tables on ScyllaDB or Cassandra, or brings them up to date. Repeating it changes nothing.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    broker: BrokerArgs,
    /// The CQL servers: host:port, several with commas [default: cql.hosts of the configuration].
    #[arg(long)]
    cql: Option<String>,
    /// Kafka is not touched; taken so that the same flags fit `serve`, `topology` and this.
    #[arg(long, hide = true)]
    kafka: Option<String>,
    /// The keyspace [default: cql.keyspace of the configuration, or sealpost].
    #[arg(long)]
    keyspace: Option<String>,
    /// Copies of a new keyspace: a number for one data centre, or a list such as dc1:3,dc2:3. An existing keyspace keeps its own.
    #[arg(long, default_value = "1")]
    replication: Replication,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let config = args.broker.read()?;
    let mut cql = match (args.cql, config.cql) {
        (Some(hosts), Some(cql)) => Cql { hosts, ..cql },
        (Some(hosts), None) => Cql::on(hosts),
        (None, Some(cql)) => cql,
        (None, None) => anyhow::bail!("where? Name the servers with --cql HOST:PORT, or in the configuration's [cql]"),
    };
    if let Some(keyspace) = args.keyspace {
        cql.keyspace = keyspace;
    }
    let done = migrate(&cql_options(&cql), &args.replication).await.context("the schema can't be applied")?;
    if args.json {
        let list: Vec<_> =
            done.iter().map(|one| serde_json::json!({ "name": one.name, "keyspace": one.keyspace, "applied_now": one.now })).collect();
        println!("{}", serde_json::json!({ "migrations": list }));
        return Ok(());
    }
    for one in &done {
        println!("{:<16} keyspace {:<20} {}", one.name, one.keyspace, if one.now { "applied now" } else { "was there" });
    }
    Ok(())
}
