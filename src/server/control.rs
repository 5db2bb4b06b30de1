//! How an operator on the same machine speaks with a running embedded broker: a socket in its folder.
//!
//! Nothing of it can be reached over a network. Only the broker's own user (and root) may connect: the socket has mode 0600, and who
//! connects is asked of the system besides. A connection carries one question and one answer, a line of JSON each.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net as blocking;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use crate::ids::{Generation, Partition};
use crate::limits;
use crate::log::embedded::EmbeddedLog;
use crate::log::layout::{self, LayoutRecord};
use crate::log::{EventLog, Topic, TopicPartition};
use crate::metrics;
use crate::projector::worker::{Positions, Progress};
use crate::server::to_own;
use crate::store::PendingTotals;
use crate::store::embedded::EmbeddedStore;

/// The socket's name in the broker's folder.
const NAME: &str = "control.sock";
/// A path that is longer than this can't be the address of a socket on every system.
const PATH_BYTES: usize = 100;
/// How long the other side of a connection may take for its line.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an answer may take: a look counts all inboxes.
const ANSWER: Duration = Duration::from_secs(60);
/// Bytes of a question.
const QUESTION_BYTES: u64 = 4_096;
/// Bytes of an answer: a line for each of a few thousand partitions.
const ANSWER_BYTES: u64 = 4 * 1024 * 1024;

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Question {
    /// How accounts are spread over partitions. Answered by [`Answer::Layout`].
    Layout,
    /// Spread them over so many from now on; asked again it changes nothing. Answered by [`Answer::Layout`] as soon as appends go there.
    Scale {
        /// How many.
        partitions: u16,
    },
    /// How the broker is. Answered by [`Answer::Look`].
    Look,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// See [`Question::Layout`].
    Layout(LayoutLook),
    /// See [`Question::Look`].
    Look(Look),
    /// It can't be done, and why.
    Refused(String),
}

/// How accounts are spread over the partitions of `inbox`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayoutLook {
    /// The number of the layout, from 0.
    pub generation: u16,
    /// Over how many partitions accounts are spread.
    pub partitions: u16,
    /// The first of them.
    pub first: u16,
    /// Partitions of the topic, older ones included.
    pub topic_partitions: u16,
    /// Older partitions that are empty for good.
    pub retired: u16,
    /// Older partitions of which not all is applied yet.
    pub draining: u16,
}

/// How a broker is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// Why it is not ready, if so.
    pub unready: Option<String>,
    /// How accounts are spread.
    pub layout: LayoutLook,
    /// Each that the projector applies.
    pub partitions: Vec<PartitionLook>,
    /// What is stored for all devices together.
    pub pending: PendingTotals,
}

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionLook {
    /// Its topic's name.
    pub topic: String,
    /// Its number.
    pub partition: u16,
    /// The offset of the next record.
    pub end: u64,
    /// Records on the log of which the view on disk does not have the effect yet.
    pub lag: u64,
}

/// Why a broker could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("no broker runs in {0}: start it with `sealpost serve`, or name its folder with --data")]
    NotRunning(PathBuf),
    /// Somebody else's broker.
    #[error("only the user whose broker it is, and root, may ask the one in {0}")]
    Forbidden(PathBuf),
    /// The connection failed.
    #[error("the broker in {dir} does not answer: {source}; call it again")]
    Io {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It refused.
    #[error("{0}")]
    Refused(String),
    /// It answered something else: one of the two is of another version.
    #[error("the broker's answer is not understood: this program and the broker are of different versions")]
    Answer,
}

/// Asks the broker of a folder.
pub async fn ask(dir: &Path, question: Question) -> Result<Answer, ControlError> {
    let asking = async {
        let stream = with_address(dir, |path| blocking::UnixStream::connect(path))?;
        stream.set_nonblocking(true)?;
        let mut stream = UnixStream::from_std(stream)?;
        let mut line = serde_json::to_vec(&question)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        BufReader::new(stream).take(ANSWER_BYTES).read_until(b'\n', &mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let answer = tokio::time::timeout(ANSWER, asking).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let answer = answer.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ControlError::NotRunning(dir.to_owned()),
        io::ErrorKind::PermissionDenied => ControlError::Forbidden(dir.to_owned()),
        _ => ControlError::Io { dir: dir.to_owned(), source },
    })?;
    if answer.is_empty() {
        let source = io::ErrorKind::UnexpectedEof.into();
        return Err(ControlError::Io { dir: dir.to_owned(), source });
    }
    match serde_json::from_slice(&answer).map_err(|_| ControlError::Answer)? {
        Answer::Refused(why) => Err(ControlError::Refused(why)),
        answer => Ok(answer),
    }
}

/// The socket's path; a long one is reached over the open folder.
fn with_address<T>(dir: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let path = dir.join(NAME);
    if path.as_os_str().len() <= PATH_BYTES {
        return act(&path);
    }
    let folder = std::fs::File::options().read(true).custom_flags(rustix::fs::OFlags::DIRECTORY.bits().cast_signed()).open(dir)?;
    act(&PathBuf::from(format!("/proc/self/fd/{}/{NAME}", folder.as_raw_fd())))
}

/// What the socket is for.
pub(super) struct Control {
    pub dir: PathBuf,
    pub log: Arc<EmbeddedLog>,
    pub store: Arc<EmbeddedStore>,
    pub progress: Option<watch::Receiver<Progress>>,
}

impl Control {
    /// Makes the socket. Whoever has the log open is alone in the folder, so what is there is a leftover.
    pub fn listen(&self) -> io::Result<UnixListener> {
        let path = self.dir.join(NAME);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = with_address(&self.dir, |path| blocking::UnixListener::bind(path))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    }

    /// Answers, one after the other, until it is dropped.
    pub async fn run(self, listener: UnixListener) {
        let _gone = Leftover(self.dir.join(NAME));
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    if let Err(error) = self.serve(stream).await {
                        tracing::debug!(%error, "a question at the control socket was not answered");
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the control socket does not work");
                    tokio::time::sleep(PATIENCE).await;
                }
            }
        }
    }

    async fn serve(&self, stream: UnixStream) -> io::Result<()> {
        let asker = stream.peer_cred()?.uid();
        if asker != 0 && asker != rustix::process::geteuid().as_raw() {
            tracing::warn!(user = asker, "somebody else's question at the control socket was refused");
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let (reader, mut writer) = stream.into_split();
        let mut line = Vec::new();
        let mut reader = BufReader::new(reader.take(QUESTION_BYTES));
        tokio::time::timeout(PATIENCE, reader.read_until(b'\n', &mut line)).await.map_err(|_| io::ErrorKind::TimedOut)??;
        let answer = match serde_json::from_slice(&line) {
            Ok(question) => self.answer(question).await.unwrap_or_else(Answer::Refused),
            Err(_) => Answer::Refused("the question is not understood".to_owned()),
        };
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        tokio::time::timeout(PATIENCE, writer.write_all(&line)).await.map_err(|_| io::ErrorKind::TimedOut)?
    }

    async fn answer(&self, question: Question) -> Result<Answer, String> {
        match question {
            Question::Layout => Ok(Answer::Layout(self.layout())),
            Question::Scale { partitions } => {
                self.scale(partitions).await?;
                Ok(Answer::Layout(self.layout()))
            }
            Question::Look => Ok(Answer::Look(self.look().await?)),
        }
    }

    fn layout(&self) -> LayoutLook {
        let layout = self.log.layout();
        let first = layout.end() - layout.count();
        let older = |is: &dyn Fn(Partition) -> bool| (0..first).map(Partition).filter(|partition| is(*partition)).count() as u16;
        LayoutLook {
            generation: layout.newest().0,
            partitions: layout.count(),
            first,
            topic_partitions: self.log.partitions(Topic::Inbox),
            retired: older(&|partition| layout.is_drained(partition)),
            draining: older(&|partition| layout.is_draining(partition)),
        }
    }

    /// Every step is one that a repeated question finds done. Once the new partitions are open the projector does the rest by itself.
    async fn scale(&self, count: u16) -> Result<(), String> {
        let layout = self.log.layout();
        if layout.count() == count {
            return Ok(());
        }
        if count == 0 {
            return Err("accounts need at least one partition".to_owned());
        }
        if !layout.is_settled() {
            return Err(format!("a change to {} partitions is not finished; it ends by itself", layout.count()));
        }
        let generation = Generation(layout.newest().0 + 1);
        if usize::from(generation.0) >= limits::LAYOUT_GENERATIONS {
            return Err(format!("the partitions were changed {} times, that is the most", generation.0 - 1));
        }
        let first = layout.end();
        let total = first.checked_add(count).ok_or_else(|| "there are too many partitions".to_owned())?;
        let log = Arc::clone(&self.log);
        let grown = tokio::task::spawn_blocking(move || log.grow_inbox(total)).await.map_err(|error| error.to_string())?;
        grown.map_err(|error| error.to_string())?;
        metrics::observe_to_own(to_own(self.log.as_ref()));
        let (_, written) = self.log.bounds(layout::TOPIC).await.map_err(|error| error.to_string())?;
        if written.0 == 0 {
            self.say(LayoutRecord::Open { generation: Generation(0), first: 0, count: layout.count() }).await?;
        }
        self.say(LayoutRecord::Open { generation, first, count }).await
    }

    async fn say(&self, record: LayoutRecord) -> Result<(), String> {
        self.log.append(layout::TOPIC, record.encode()).await.map(drop).map_err(|error| format!("{error}; call it again"))
    }

    async fn look(&self) -> Result<Look, String> {
        let view = Positions::in_one(&self.store);
        let mut partitions = Vec::new();
        for topic in [Topic::Inbox, Topic::Directory, Topic::Groups] {
            for partition in (0..self.log.partitions(topic)).map(Partition) {
                let of = TopicPartition { topic, partition };
                // The view first: the log only grows meanwhile.
                let stored = view.of(of).await.map_err(|error| error.to_string())?;
                let (earliest, end) = self.log.bounds(of).await.map_err(|error| error.to_string())?;
                let lag = end.0.saturating_sub(stored.max(earliest).0);
                partitions.push(PartitionLook { topic: topic.name().to_owned(), partition: partition.0, end: end.0, lag });
            }
        }
        let behind = self.progress.as_ref().is_some_and(|progress| !progress.borrow().caught_up);
        let unready = match self.log.health() {
            Err(error) => Some(error.to_string()),
            Ok(()) => behind.then(|| "the projector has not caught up with the log".to_owned()),
        };
        let pending = self.store.pending_totals().await.map_err(|error| error.to_string())?;
        Ok(Look { unready, layout: self.layout(), partitions, pending })
    }
}

/// Takes the socket away with the broker.
struct Leftover(PathBuf);

impl Drop for Leftover {
    fn drop(&mut self) {
        // One that stays is taken away by the next start.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_stable() {
        for (question, text) in [
            (Question::Layout, "\"layout\""),
            (Question::Scale { partitions: 64 }, "{\"scale\":{\"partitions\":64}}"),
            (Question::Look, "\"look\""),
        ] {
            assert_eq!(serde_json::to_string(&question).expect("JSON"), text);
            assert_eq!(serde_json::from_str::<Question>(text).expect("a question"), question);
        }
        assert!(serde_json::from_str::<Question>("{\"scale\":{\"partitions\":64,\"force\":true}}").is_err());
    }

    #[test]
    fn a_long_path_has_an_address_too() {
        let dir = tempfile::tempdir().expect("a folder");
        let long = dir.path().join("x".repeat(120));
        std::fs::create_dir(&long).expect("made");
        let _listener = with_address(&long, |path| blocking::UnixListener::bind(path)).expect("binds");
        assert!(long.join(NAME).exists());
        with_address(&long, |path| blocking::UnixStream::connect(path)).expect("connects");
    }
}
