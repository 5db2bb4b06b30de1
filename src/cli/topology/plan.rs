//! What topics should be, what they are, and what to do about it. Pure.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::log::Topic;
use crate::log::kafka::{FoundTopic, NewKafkaTopic};

/// The data file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    topic: Vec<WantedTopic>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct WantedTopic {
    name: String,
    partitions: u16,
    #[serde(default)]
    settings: BTreeMap<String, String>,
}

/// Something that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The topic is missing.
    Create(NewKafkaTopic),
    /// A setting has another value, or none.
    Set {
        /// Of which topic.
        topic: Topic,
        /// Which setting.
        key: String,
        /// What it is.
        is: Option<String>,
        /// What it should be.
        should: String,
    },
    /// What `apply` can't change: it is said, and left.
    Differs {
        /// Of which topic.
        topic: Topic,
        /// What.
        what: String,
    },
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Create(new) => {
                write!(f, "+ {:<10} {} partitions, {} copies", new.topic.name(), new.partitions, new.replication)?;
                new.settings.iter().try_for_each(|(key, value)| write!(f, "\n    + {key} = {value}"))
            }
            Self::Set { topic, key, is, should } => {
                write!(f, "~ {:<10} {key}: {} -> {should}", topic.name(), is.as_deref().unwrap_or("(the cluster's default)"))
            }
            Self::Differs { topic, what } => write!(f, "! {:<10} {what}", topic.name()),
        }
    }
}

/// Reads a data file; what is wrong with it.
pub fn parse(text: &str) -> Result<Wanted, String> {
    let wanted: Wanted = toml::from_str(text).map_err(|error| error.to_string())?;
    for topic in Topic::ON_CLUSTER {
        match wanted.topic.iter().filter(|wanted| wanted.name == topic.name()).count() {
            1 => {}
            0 => return Err(format!("the topic `{}` is missing", topic.name())),
            _ => return Err(format!("the topic `{}` is there twice", topic.name())),
        }
    }
    match wanted.topic.iter().find(|wanted| Topic::ON_CLUSTER.iter().all(|topic| topic.name() != wanted.name)) {
        Some(other) => Err(format!("`{}` is no topic of Sealpost", other.name)),
        None => Ok(wanted),
    }
}

/// What differs, topic by topic.
pub fn compare(wanted: &Wanted, replication: u16, found: &BTreeMap<Topic, FoundTopic>) -> Vec<Change> {
    let mut changes = Vec::new();
    for topic in Topic::ON_CLUSTER {
        let Some(want) = wanted.topic.iter().find(|wanted| wanted.name == topic.name()) else { continue };
        let mut new = NewKafkaTopic::new(topic, want.partitions, replication);
        new.settings.extend(want.settings.clone());
        if replication >= 3 {
            new.settings.push(("min.insync.replicas".to_owned(), "2".to_owned()));
        }
        let Some(is) = found.get(&topic) else {
            changes.push(Change::Create(new));
            continue;
        };
        if is.partitions != usize::from(want.partitions) {
            let what = format!("has {} partitions, the file says {}; a topic keeps its partitions", is.partitions, want.partitions);
            changes.push(Change::Differs { topic, what });
        }
        if is.replication != usize::from(replication) {
            let what = format!("has {} copies, {replication} are wanted; move them with Kafka's own reassignment tool", is.replication);
            changes.push(Change::Differs { topic, what });
        }
        for (key, should) in new.settings {
            let is = is.settings.get(&key).cloned();
            if is.as_ref() != Some(&should) {
                changes.push(Change::Set { topic, key, is, should });
            }
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = include_str!("../../../topology/topics.toml");

    #[test]
    fn the_file_has_every_topic_once() {
        parse(FILE).expect("valid");
        let error = parse(&FILE.replace("name = \"push\"", "name = \"pull\"")).expect_err("refused");
        assert!(error.contains("push"), "{error}");
        assert!(parse(&format!("{FILE}\n[[topic]]\nname = \"push\"\npartitions = 1\n")).expect_err("refused").contains("twice"));
        assert!(parse(&FILE.replacen("partitions", "partition", 1)).is_err());
    }

    #[test]
    fn an_empty_cluster_gets_everything_and_then_nothing_differs() {
        let wanted = parse(FILE).expect("valid");
        let changes = compare(&wanted, 3, &BTreeMap::new());
        assert_eq!(changes.len(), Topic::ON_CLUSTER.len());
        let mut made = BTreeMap::new();
        for change in changes {
            let Change::Create(new) = change else { panic!("{change}") };
            assert!(new.settings.contains(&("min.insync.replicas".to_owned(), "2".to_owned())));
            let settings = new.settings.into_iter().collect();
            made.insert(new.topic, FoundTopic { partitions: new.partitions.into(), replication: 3, settings });
        }
        assert_eq!(compare(&wanted, 3, &made), []);
        let inbox = made.get_mut(&Topic::Inbox).expect("made");
        inbox.partitions = 8;
        inbox.settings.insert("retention.ms".to_owned(), "1".to_owned());
        inbox.settings.insert("of.the.operator".to_owned(), "stays".to_owned());
        let changes = compare(&wanted, 3, &made);
        assert!(matches!(&changes[..], [Change::Differs { .. }, Change::Set { key, .. }] if key == "retention.ms"), "{changes:?}");
    }
}
