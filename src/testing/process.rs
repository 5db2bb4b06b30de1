//! The broker as a real process that tests kill.

#[cfg(feature = "cli")]
pub use crate::cli::child::BrokerProcess;

/// Starts this program's broker: its data folder, and what it prints, are `data` and `log` in the folder. On the cluster profile, if tests are
/// to run on that, with topics and keyspaces that are the folder's own.
#[cfg(feature = "cli")]
pub async fn start(program: &std::path::Path, folder: &std::path::Path) -> anyhow::Result<BrokerProcess> {
    #[cfg(feature = "cluster")]
    let settings = super::cluster::TestCluster::of_folder(folder).await?.map_or_else(Vec::new, |cluster| cluster.settings());
    #[cfg(not(feature = "cluster"))]
    let settings = Vec::new();
    BrokerProcess::start_with(program, &folder.join("data"), &folder.join("log"), settings).await
}
