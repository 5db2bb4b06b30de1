//! Which broker a command is about: its configuration file and its folder.

use std::path::PathBuf;

use crate::config::Config;

/// What `serve` and the tools that work on its folder have in common.
#[derive(Debug, clap::Args)]
pub struct BrokerArgs {
    /// Configuration file (TOML).
    #[arg(long, env = "SEALPOST_CONFIG")]
    config: Option<PathBuf>,
    /// The broker's folder, which holds everything; `serve` makes it if it is missing [default: sealpost-data].
    #[arg(long)]
    data: Option<PathBuf>,
}

impl BrokerArgs {
    /// The configuration: file, variables, flags (`change` adds those of the command); validated.
    pub fn load(self, change: impl FnOnce(&mut Config)) -> anyhow::Result<Config> {
        self.load_from(std::env::vars(), change)
    }

    /// The configuration as file and variables have it, for commands that need only a part of it; not validated.
    pub fn read(&self) -> anyhow::Result<Config> {
        Ok(Config::load(self.config.as_deref(), std::env::vars())?)
    }

    fn load_from(self, vars: impl IntoIterator<Item = (String, String)>, change: impl FnOnce(&mut Config)) -> anyhow::Result<Config> {
        let mut config = Config::load(self.config.as_deref(), vars)?;
        if let Some(data) = self.data {
            config.data = data;
        }
        change(&mut config);
        config.validate()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn flags_win_over_variables_and_variables_over_the_file_and_all_is_validated() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("sealpost.toml");
        std::fs::write(&file, "data = \"from-file\"\nlisten = \"127.0.0.1:1\"").expect("writes");
        let args = |data: Option<&str>| BrokerArgs { config: Some(file.clone()), data: data.map(Into::into) };
        let vars = || [("SEALPOST_DATA".to_owned(), "from-variable".to_owned())];
        let data = |args: BrokerArgs, vars: Vec<(String, String)>| args.load_from(vars, |_| ()).expect("valid").data;
        assert_eq!(data(args(None), vec![]), Path::new("from-file"));
        assert_eq!(data(args(None), vars().into()), Path::new("from-variable"));
        assert_eq!(data(args(Some("from-flag")), vars().into()), Path::new("from-flag"));

        let error = args(Some("")).load_from([], |_| ()).expect_err("refused").to_string();
        assert!(error.contains("data"), "{error}");
        let open = |config: &mut Config| config.listen = ([0, 0, 0, 0], 1).into();
        let error = args(None).load_from([], open).expect_err("refused").to_string();
        assert!(error.contains("realm"), "what a command changes is validated too: {error}");
    }
}
