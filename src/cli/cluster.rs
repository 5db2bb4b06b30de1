//! Where a cluster is: the flags that everything which works with one has in common.

use std::path::PathBuf;

use crate::config::{Config, ConfigError, Cql, Kafka};

/// Kafka and the CQL store, as flags; they win over the file and the variables.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ClusterArgs {
    /// Kafka's brokers: host:port, several with commas. TLS and SASL are set in the configuration file or by variables.
    #[arg(long, value_name = "HOSTS")]
    pub kafka: Option<String>,
    /// The CQL store's hosts (ScyllaDB, Cassandra): host:port, several with commas.
    #[arg(long, value_name = "HOSTS")]
    pub cql: Option<String>,
}

impl ClusterArgs {
    /// Lays the flags over the configuration.
    pub fn set(self, config: &mut Config) {
        if let Some(brokers) = self.kafka {
            match &mut config.kafka {
                Some(kafka) => kafka.brokers = brokers,
                None => config.kafka = Some(Kafka::on(brokers)),
            }
        }
        if let Some(hosts) = self.cql {
            match &mut config.cql {
                Some(cql) => cql.hosts = hosts,
                None => config.cql = Some(Cql::on(hosts)),
            }
        }
    }
}

/// For tools that run no broker: the configuration is read for where things are, and only that is checked.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ToolArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Configuration file (TOML).
    #[arg(long, env = "SEALPOST_CONFIG")]
    config: Option<PathBuf>,
}

impl ToolArgs {
    /// File, variables, flags.
    pub fn load(self) -> Result<Config, ConfigError> {
        let mut config = Config::load(self.config.as_deref(), std::env::vars())?;
        self.cluster.set(&mut config);
        Ok(config)
    }
}

/// Which service a tool is about: a cluster, or an embedded broker on this machine.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct WhereArgs {
    #[command(flatten)]
    tool: ToolArgs,
    /// The folder of an embedded broker that runs on this machine, in place of a cluster.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kafka", "cql"])]
    data: Option<PathBuf>,
}

/// Where it is.
#[derive(Debug)]
pub enum Where {
    /// A cluster, if the configuration names one.
    Cluster(Box<Config>),
    /// An embedded broker's folder.
    Folder(PathBuf),
}

impl WhereArgs {
    /// A folder that is named by a flag is meant whatever the file says; else what the file and the variables name.
    pub fn load(self) -> Result<Where, ConfigError> {
        if let Some(data) = self.data {
            return Ok(Where::Folder(data));
        }
        let config = self.tool.load()?;
        // Without either, what is missing is said.
        let is_folder = config.kafka.is_none() && config.cql.is_none() && config.data.is_dir();
        Ok(if is_folder { Where::Folder(config.data) } else { Where::Cluster(Box::new(config)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_change_where_and_keep_how() {
        let mut config: Config =
            toml::from_str("[kafka]\nbrokers = \"a\"\nprefix = \"p-\"\n[cql]\nhosts = \"b\"\nkeyspace = \"k\"").expect("parses");
        ClusterArgs { kafka: Some("c:1".to_owned()), cql: Some("d:2".to_owned()) }.set(&mut config);
        let (kafka, cql) = (config.kafka.expect("set"), config.cql.expect("set"));
        assert_eq!((kafka.brokers.as_str(), kafka.prefix.as_str()), ("c:1", "p-"));
        assert_eq!((cql.hosts.as_str(), cql.keyspace.as_str()), ("d:2", "k"));

        let mut config = Config::default();
        ClusterArgs::default().set(&mut config);
        assert!(config.kafka.is_none() && config.cql.is_none());
        ClusterArgs { kafka: Some("c:1".to_owned()), cql: Some("d:2".to_owned()) }.set(&mut config);
        config.validate().expect("the defaults are valid");
    }
}
