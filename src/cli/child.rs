//! A broker as a process of its own on this machine, that can be killed and started again: for the demo, the kill tests
//! and the benches.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

/// How long a broker may take until it listens: recovery of a large log included.
const START: Duration = Duration::from_secs(60);
/// What `sealpost serve` prints once it takes connections.
const LISTENING: &str = "listening on http://";

/// `sealpost serve --dev` on a folder and a loopback port that stay the same over restarts. Killed when dropped.
#[derive(Debug)]
pub struct BrokerProcess {
    program: PathBuf,
    data: PathBuf,
    log: PathBuf,
    port: u16,
    settings: Vec<(String, String)>,
    child: Option<Child>,
}

impl BrokerProcess {
    /// Starts this program's broker on a data folder; its output is appended to `log`. Returns once it listens.
    pub async fn start(program: &Path, data: &Path, log: &Path) -> anyhow::Result<Self> {
        Self::start_with(program, data, log, Vec::new()).await
    }

    /// The same with settings by environment variables.
    pub async fn start_with(program: &Path, data: &Path, log: &Path, settings: Vec<(String, String)>) -> anyhow::Result<Self> {
        let (program, data, log) = (program.to_owned(), data.to_owned(), log.to_owned());
        let mut broker = Self { program, data, log, port: 0, settings, child: None };
        broker.restart().await?;
        Ok(broker)
    }

    /// Its base URL.
    pub fn url(&self) -> url::Url {
        format!("http://127.0.0.1:{}", self.port).parse().expect("an address and a port make a URL")
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Its data folder.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// What it was told by environment variables.
    pub fn settings(&self) -> &[(String, String)] {
        &self.settings
    }

    /// Everything that it has printed.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Starts it without waiting until it listens.
    pub fn spawn(&mut self) -> anyhow::Result<()> {
        self.kill9();
        let log =
            OpenOptions::new().create(true).append(true).open(&self.log).with_context(|| format!("can't write {}", self.log.display()))?;
        let child = Command::new(&self.program)
            .arg("serve")
            .arg("--dev")
            .arg("--data")
            .arg(&self.data)
            .arg("--listen")
            .arg(format!("127.0.0.1:{}", self.port))
            .envs(self.settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn();
        self.child = Some(child.with_context(|| format!("can't start {}", self.program.display()))?);
        Ok(())
    }

    /// Kills it if it runs, starts it, and returns once it listens; how long that took.
    pub async fn restart(&mut self) -> anyhow::Result<Duration> {
        self.kill9();
        let began = Instant::now();
        let before = fs::metadata(&self.log).map_or(0, |meta| meta.len());
        self.spawn()?;
        loop {
            if let Some(port) = listening(&self.log, before) {
                self.port = port;
                return Ok(began.elapsed());
            }
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                bail!("the broker ended with {status}; its last words:\n{}", last_words(&self.log));
            }
            ensure!(began.elapsed() < START, "the broker does not listen after {START:?}; its last words:\n{}", last_words(&self.log));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Fails only if it is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks it to stop (SIGTERM) and waits until it has; whether it ended well in time.
    pub async fn stop(&mut self, patience: Duration) -> anyhow::Result<bool> {
        let Some(mut child) = self.child.take() else { return Ok(true) };
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let until = Instant::now() + patience;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status.success());
            }
            if Instant::now() > until {
                self.child = Some(child);
                self.kill9();
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for BrokerProcess {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// The port that it says it listens on, in what it printed behind `from`.
fn listening(log: &Path, from: u64) -> Option<u16> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let mut file = File::open(log).ok()?;
    file.seek(SeekFrom::Start(from)).ok()?;
    let mut text = Vec::new();
    file.read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    // Only a whole line: the port may be half written.
    let line = text.split_inclusive('\n').find(|line| line.ends_with('\n') && line.contains(LISTENING))?;
    let address = line.split_once(LISTENING)?.1;
    address.split(|c: char| !(c.is_ascii_digit() || c == '.' || c == ':')).next()?.rsplit_once(':')?.1.parse().ok()
}

fn last_words(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_read_from_a_whole_line() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        for (text, port) in [
            ("", None),
            ("listening on http://127.0.0.1:80", None),
            ("listening on http://127.0.0.1:8080\n", Some(8080)),
            ("INFO ready\nlistening on http://127.0.0.1:4711 (try /docs)\nmore\n", Some(4711)),
        ] {
            fs::write(&log, format!("listening on http://127.0.0.1:1\n{text}")).unwrap();
            assert_eq!(listening(&log, "listening on http://127.0.0.1:1\n".len() as u64), port, "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_program_that_ends_at_once_is_said_to() {
        let folder = tempfile::tempdir().unwrap();
        let error = BrokerProcess::start(Path::new("/bin/false"), folder.path(), &folder.path().join("log")).await.unwrap_err();
        assert!(error.to_string().contains("ended"), "{error}");
    }
}
