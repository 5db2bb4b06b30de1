//! This device's database: where it is, and registering it at the first start.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::ChatArgs;
use crate::client::{Client, Environment, PrivateCa, StoreError, dev_token_with};
use crate::wire::stream::Code;

/// Opens this device's account, or registers it.
pub(super) async fn open(args: &ChatArgs) -> anyhow::Result<Client> {
    let folder = folder(args)?;
    make_private(&folder).with_context(|| format!("can't make the folder {}", folder.display()))?;
    let path = folder.join(file_name(args));
    if args.fresh && path.exists() {
        let kept = path.with_extension(format!("old-{}", std::process::id()));
        std::fs::rename(&path, &kept).with_context(|| format!("can't set {} aside", path.display()))?;
        eprintln!("sealpost: the history so far is kept in {}", kept.display());
    }
    let ca = args.ca.as_deref().map(PrivateCa::from_file).transpose()?;
    let environment = Environment { ca, ..Environment::default() };
    match Client::open_with(&path, environment.clone()).await {
        Ok(client) => Ok(client),
        Err(crate::client::Error::Store(StoreError::NoAccount)) => register(args, &path, environment).await,
        Err(crate::client::Error::Store(StoreError::InUse)) => {
            bail!("this device is open in another terminal; --device NAME makes a second device")
        }
        Err(error) => Err(error).with_context(|| format!("can't open {}", path.display())),
    }
}

async fn register(args: &ChatArgs, path: &Path, environment: Environment) -> anyhow::Result<Client> {
    let token = match &args.token {
        Some(token) => token.0.clone(),
        None => match dev_token_with(&args.server, &args.identity, &environment).await {
            Ok(token) => token,
            Err(error) if matches!(error.code(), Some(Code::NotFound | Code::Forbidden)) => bail!(
                "{} does not run in development mode, so it wants proof of who you are: a token of {}'s identity provider, in --token or \
                 SEALPOST_TOKEN",
                args.server,
                args.identity.realm()
            ),
            Err(error) => return Err(error).with_context(|| no_broker(args)),
        },
    };
    let name = args.device.clone().unwrap_or_else(|| "terminal".into());
    let client = Client::register_with(&args.server, vec![token], &name, path, environment).await.context("can't register this device")?;
    // Writing under the identity that was asked for, should the account have others.
    client.write_as(&args.identity).await?;
    Ok(client)
}

fn no_broker(args: &ChatArgs) -> String {
    format!("can't reach the broker at {}; `sealpost serve` starts one, --server names another", args.server)
}

fn folder(args: &ChatArgs) -> anyhow::Result<PathBuf> {
    if let Some(folder) = &args.data {
        return Ok(folder.clone());
    }
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let share = set("XDG_DATA_HOME").or_else(|| set("HOME").map(|home| home.join(".local").join("share")));
    Ok(share.context("there is no HOME; name a folder with --data")?.join("sealpost"))
}

/// The folder holds keys: for its owner only, if it is made here.
fn make_private(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// One database a device: identity, and device name if one was given.
fn file_name(args: &ChatArgs) -> String {
    let device = args.device.as_ref().map(|name| format!(".{name}")).unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '@' | '.' | '-' | '_');
    let escaped = |c: char| if plain(c) { c.to_string() } else { format!("%{:x}", u32::from(c)) };
    format!("{}{device}.db", args.identity).chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        chat: ChatArgs,
    }

    #[test]
    fn each_device_has_a_file_of_its_own_inside_the_folder() {
        let name = |device: &str| {
            let cli = Cli::try_parse_from(["chat", "--as", "alice@socialink", "--device", device]).expect("valid");
            file_name(&cli.chat)
        };
        assert_eq!(name("phone"), "alice@socialink.phone.db");
        assert_ne!(name("phone"), name("laptop"));
        assert!(!name("../../etc").contains('/'));
    }
}
