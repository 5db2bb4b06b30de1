//! The topics as an operator wants them, and how a cluster differs from that. Pure: asking and changing are
//! [`crate::log::kafka`]'s and the command line's.
//!
//! What may follow from a difference is small on purpose: topics are made and settings are set. Nothing is ever removed, and no
//! partition is ever added here: that is a change of the layout (`crate::log::layout`), which `sealpost topology scale` makes.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use crate::log::Topic;
use crate::log::kafka::{KafkaCluster, KafkaTopic, NewKafkaTopic};

/// The file that is built in.
const BUILT_IN: &str = include_str!("../topology/topics.toml");
/// Copies from which on two of them must have a record before it counts.
const COPIES_FOR_TWO_IN_SYNC: usize = 3;
const PARTITIONS_MAX: u16 = 1024;

/// What is wrong with a topology file. A retry can't help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// It is not TOML, or has unknown keys, or a topic is missing.
    #[error("the topology is not right:\n{0}")]
    File(String),
    /// A value makes no sense.
    #[error("{key}: {problem}")]
    Invalid {
        /// Which key.
        key: String,
        /// What is wrong, and what to do.
        problem: String,
    },
}

/// All topics as they shall be.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// On how many brokers each record is. Unset: 3, or as many as there are brokers.
    replication: Option<u16>,
    inbox: WantedTopic,
    groups: WantedTopic,
    directory: WantedTopic,
    metadata: WantedTopic,
    push: WantedTopic,
    layout: WantedTopic,
}

/// A topic as it shall be.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct WantedTopic {
    partitions: u16,
    retention: Retention,
    #[serde(default)]
    settings: BTreeMap<String, String>,
}

/// How long records are kept: `30d`, `12h`, `5m`, `90s` or `forever`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retention {
    Forever,
    Ms(u64),
}

impl Retention {
    const UNITS: [(char, u64); 4] = [('d', 86_400_000), ('h', 3_600_000), ('m', 60_000), ('s', 1000)];

    fn parse(text: &str) -> Option<Self> {
        if text == "forever" {
            return Some(Self::Forever);
        }
        let (_, ms) = Self::UNITS.into_iter().find(|(unit, _)| text.ends_with(*unit))?;
        let count: u64 = text[..text.len() - 1].trim().parse().ok().filter(|count| *count > 0)?;
        count.checked_mul(ms).filter(|ms| i64::try_from(*ms).is_ok()).map(Self::Ms)
    }

    /// As Kafka's `retention.ms` has it.
    fn setting(self) -> String {
        match self {
            Self::Forever => "-1".to_owned(),
            Self::Ms(ms) => ms.to_string(),
        }
    }
}

impl<'de> Deserialize<'de> for Retention {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("a time such as \"30d\", \"12h\", \"5m\" or \"90s\", or \"forever\""))
    }
}

impl Topology {
    /// The one that is built in.
    pub fn built_in() -> Self {
        Self::parse(BUILT_IN).expect("a test parses it")
    }

    /// Reads and checks one.
    pub fn parse(text: &str) -> Result<Self, TopologyError> {
        let topology: Self = toml::from_str(text).map_err(|error| TopologyError::File(error.to_string()))?;
        let invalid = |key: String, problem: &str| Err(TopologyError::Invalid { key, problem: problem.to_owned() });
        if topology.replication == Some(0) {
            return invalid("replication".to_owned(), "must be at least 1");
        }
        for topic in Topic::ON_CLUSTER {
            let wanted = topology.of(topic);
            if !(1..=PARTITIONS_MAX).contains(&wanted.partitions) {
                return invalid(format!("{}.partitions", topic.name()), "must be from 1 to 1024");
            }
            if topic == Topic::Layout && (wanted.partitions != 1 || wanted.retention != Retention::Forever) {
                return invalid("layout".to_owned(), "must have 1 partition and be kept forever: it says where accounts are");
            }
            if wanted.settings.contains_key("retention.ms") {
                return invalid(format!("{}.settings", topic.name()), "retention.ms follows from `retention`");
            }
            if topic != Topic::Metadata && wanted.settings.get("cleanup.policy").is_some_and(|policy| policy != "delete") {
                return invalid(format!("{}.settings", topic.name()), "this topic must not be compacted: `cleanup.policy` is `delete`");
            }
        }
        Ok(topology)
    }

    /// With another number of copies.
    pub fn with_replication(mut self, replication: Option<u16>) -> Self {
        self.replication = replication.or(self.replication);
        self
    }

    const fn of(&self, topic: Topic) -> &WantedTopic {
        match topic {
            Topic::Inbox => &self.inbox,
            Topic::Groups => &self.groups,
            Topic::Directory => &self.directory,
            Topic::Metadata => &self.metadata,
            Topic::Push => &self.push,
            Topic::Layout => &self.layout,
        }
    }

    /// All settings of a topic that is on so many brokers.
    fn settings(&self, topic: Topic, copies: usize) -> BTreeMap<String, String> {
        let wanted = self.of(topic);
        let mut settings: BTreeMap<String, String> = NewKafkaTopic::new(topic, wanted.partitions, 1).settings.into_iter().collect();
        let in_sync = if copies >= COPIES_FOR_TWO_IN_SYNC { "2" } else { "1" };
        for (key, value) in [
            ("cleanup.policy", "delete"),
            ("min.insync.replicas", in_sync),
            ("retention.bytes", "-1"),
            ("unclean.leader.election.enable", "false"),
        ] {
            settings.insert(key.to_owned(), value.to_owned());
        }
        settings.insert("retention.ms".to_owned(), wanted.retention.setting());
        settings.extend(wanted.settings.clone());
        settings
    }

    /// How the cluster differs.
    pub fn compare(&self, found: &KafkaCluster) -> Plan {
        let copies = self.replication.map_or_else(|| found.brokers.clamp(1, COPIES_FOR_TWO_IN_SYNC), usize::from);
        let topics = Topic::ON_CLUSTER
            .into_iter()
            .map(|topic| match found.topics.iter().find(|one| one.topic == topic) {
                None => self.missing(topic, copies),
                Some(one) => self.difference(one, copies),
            })
            .collect();
        let mut notes = Vec::new();
        if copies == 1 {
            notes.push("one copy of each record: fine to try things out, and lost with its broker".to_owned());
        }
        if copies > found.brokers {
            notes.push(format!("{copies} copies need {copies} brokers, and {} are alive: new topics can't be made", found.brokers));
        }
        Plan { brokers: found.brokers, topics, notes }
    }

    fn missing(&self, topic: Topic, copies: usize) -> TopicPlan {
        let partitions = self.of(topic).partitions;
        let settings = self.settings(topic, copies).into_iter().map(|(key, to)| Setting { key, from: None, to }).collect();
        TopicPlan {
            topic: topic.name(),
            of: topic,
            partitions: usize::from(partitions),
            copies,
            create: true,
            settings,
            by_hand: Vec::new(),
        }
    }

    fn difference(&self, found: &KafkaTopic, copies: usize) -> TopicPlan {
        let wanted = self.of(found.topic);
        // What holds is what the topic has: a topic on three brokers stays so while one of them is away.
        let settings = self.settings(found.topic, found.replication);
        let differs = |(key, to): (String, String)| {
            let from = found.settings.get(&key).cloned();
            (from.as_ref() != Some(&to)).then_some(Setting { key, from, to })
        };
        let mut by_hand = Vec::new();
        // The file says how many inbox has at first.
        let scaled = found.topic == Topic::Inbox && found.partitions > usize::from(wanted.partitions);
        if found.partitions != usize::from(wanted.partitions) && !scaled {
            by_hand.push(format!(
                "{} partitions, not {}: the number of a topic that is in use stays (but that of inbox, which `sealpost topology scale` raises); \
                 write it into the file",
                found.partitions, wanted.partitions
            ));
        }
        if found.replication < copies {
            by_hand.push(format!(
                "each record on {} brokers, not {copies}: kafka-reassign-partitions.sh adds copies (then run `apply` again)",
                found.replication
            ));
        }
        TopicPlan {
            topic: found.topic.name(),
            of: found.topic,
            partitions: found.partitions,
            copies: found.replication,
            create: false,
            settings: settings.into_iter().filter_map(differs).collect(),
            by_hand,
        }
    }
}

/// How a cluster differs from a topology.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Brokers that are alive.
    pub brokers: usize,
    /// Every topic, also those without a difference.
    pub topics: Vec<TopicPlan>,
    /// What an operator should know besides.
    pub notes: Vec<String>,
}

/// How one topic differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TopicPlan {
    /// Its name, without the prefix.
    pub topic: &'static str,
    #[serde(skip)]
    of: Topic,
    /// Partitions that it has or gets.
    pub partitions: usize,
    /// Copies that it has or gets.
    pub copies: usize,
    /// It does not exist, and is made.
    pub create: bool,
    /// Settings that are changed, or that it is made with.
    pub settings: Vec<Setting>,
    /// What differs and is not changed here, with what does.
    pub by_hand: Vec<String>,
}

/// A setting that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Kafka's name.
    pub key: String,
    /// What holds now.
    pub from: Option<String>,
    /// What shall hold.
    pub to: String,
}

impl TopicPlan {
    const fn is_clean(&self) -> bool {
        !self.create && self.settings.is_empty() && self.by_hand.is_empty()
    }

    fn pairs(&self) -> Vec<(String, String)> {
        self.settings.iter().map(|setting| (setting.key.clone(), setting.to.clone())).collect()
    }
}

impl Plan {
    /// Nothing differs.
    pub fn is_clean(&self) -> bool {
        self.topics.iter().all(TopicPlan::is_clean)
    }

    /// There is something that can be made or set.
    pub fn has_changes(&self) -> bool {
        self.topics.iter().any(|topic| topic.create || !topic.settings.is_empty())
    }

    /// Whether nothing differs once topics are made and settings are set.
    pub fn is_mended_by_applying(&self) -> bool {
        self.topics.iter().all(|topic| topic.by_hand.is_empty())
    }

    /// Topics to make.
    pub fn to_create(&self) -> Vec<NewKafkaTopic> {
        let make = |plan: &TopicPlan| NewKafkaTopic {
            topic: plan.of,
            partitions: u16::try_from(plan.partitions).unwrap_or(u16::MAX),
            replication: u16::try_from(plan.copies).unwrap_or(u16::MAX),
            settings: plan.pairs(),
        };
        self.topics.iter().filter(|plan| plan.create).map(make).collect()
    }

    /// Settings to set on topics that exist.
    pub fn to_alter(&self) -> Vec<(Topic, Vec<(String, String)>)> {
        self.topics.iter().filter(|plan| !plan.create && !plan.settings.is_empty()).map(|plan| (plan.of, plan.pairs())).collect()
    }
}

/// With words for the values that people can't read at a glance.
fn readable(key: &str, value: &str) -> String {
    let Ok(number) = value.parse::<u64>() else {
        return match (key, value) {
            ("retention.ms", "-1") => "-1 (forever)".to_owned(),
            ("retention.bytes", "-1") => "-1 (no cap)".to_owned(),
            _ => value.to_owned(),
        };
    };
    if key.ends_with(".ms") && number >= 1000 {
        let (unit, ms) = Retention::UNITS.into_iter().find(|(_, ms)| number % ms == 0).unwrap_or(('s', 1000));
        return format!("{value} ({} {unit})", number / ms);
    }
    if key.ends_with(".bytes") && number >= 1 << 20 {
        return format!("{value} ({:.1} MiB)", number as f64 / f64::from(1 << 20));
    }
    value.to_owned()
}

/// A diff: `+` is made, `~` is changed, `!` differs and is not changed here.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let same: Vec<&str> = self.topics.iter().filter(|topic| topic.is_clean()).map(|topic| topic.topic).collect();
        for topic in self.topics.iter().filter(|topic| !topic.is_clean()) {
            let sign = if topic.create {
                '+'
            } else if topic.settings.is_empty() {
                '!'
            } else {
                '~'
            };
            writeln!(f, "{sign} {}  ({} partitions, {} of each record)", topic.topic, topic.partitions, copies(topic.copies))?;
            for Setting { key, from, to } in &topic.settings {
                let to = readable(key, to);
                match from {
                    None => writeln!(f, "    + {key} = {to}")?,
                    Some(from) => writeln!(f, "    ~ {key} = {} -> {to}", readable(key, from))?,
                }
            }
            for problem in &topic.by_hand {
                writeln!(f, "    ! {problem}")?;
            }
        }
        if !same.is_empty() {
            writeln!(f, "= {}  as wanted", same.join(", "))?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

fn copies(count: usize) -> String {
    if count == 1 { "1 copy".to_owned() } else { format!("{count} copies") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(brokers: usize, topics: Vec<KafkaTopic>) -> KafkaCluster {
        KafkaCluster { brokers, topics }
    }

    /// What a cluster is after the plan was made.
    fn applied(topology: &Topology, brokers: usize) -> KafkaCluster {
        let plan = topology.compare(&cluster(brokers, Vec::new()));
        let topics = plan.to_create().into_iter().map(|new| KafkaTopic {
            topic: new.topic,
            partitions: usize::from(new.partitions),
            replication: usize::from(new.replication),
            under_replicated: 0,
            leaderless: 0,
            settings: new.settings.iter().cloned().collect(),
            overrides: new.settings.into_iter().collect(),
        });
        cluster(brokers, topics.collect())
    }

    fn of(plan: &Plan, topic: Topic) -> &TopicPlan {
        plan.topics.iter().find(|plan| plan.topic == topic.name()).expect("every topic is there")
    }

    #[test]
    fn an_empty_cluster_gets_everything_and_then_nothing_differs() {
        let topology = Topology::built_in();
        for (brokers, copies, in_sync) in [(1, 1, "1"), (2, 2, "1"), (3, 3, "2"), (9, 3, "2")] {
            let plan = topology.compare(&cluster(brokers, Vec::new()));
            assert_eq!(plan.to_create().len(), Topic::ON_CLUSTER.len());
            assert!(plan.to_alter().is_empty() && plan.has_changes() && !plan.is_clean());
            for new in plan.to_create() {
                assert_eq!(usize::from(new.replication), copies);
                assert!(new.settings.contains(&("min.insync.replicas".to_owned(), in_sync.to_owned())), "{new:?}");
            }
            assert_eq!(plan.notes.len(), usize::from(copies == 1), "{:?}", plan.notes);
            let after = topology.compare(&applied(&topology, brokers));
            assert!(after.is_clean() && !after.has_changes(), "{after}");
        }
        let text = topology.compare(&cluster(1, Vec::new())).to_string();
        assert!(text.contains("+ push  (16 partitions, 1 copy") && text.contains("retention.ms = 300000 (5 m)"), "{text}");
        assert!(text.contains("retention.ms = -1 (forever)"), "{text}");
    }

    #[test]
    fn drift_is_shown_and_only_settings_are_mended() {
        let topology = Topology::built_in();
        let mut found = applied(&topology, 3);
        let inbox = found.topics.iter_mut().find(|one| one.topic == Topic::Inbox).expect("there");
        inbox.settings.insert("retention.ms".to_owned(), "60000".to_owned());
        inbox.settings.insert("flush.messages".to_owned(), "1".to_owned());
        inbox.partitions = 8;
        let plan = topology.compare(&found);
        let inbox = of(&plan, Topic::Inbox);
        assert_eq!(plan.to_alter(), [(Topic::Inbox, vec![("retention.ms".to_owned(), "2678400000".to_owned())])]);
        assert!(plan.to_create().is_empty());
        assert!(inbox.by_hand.len() == 1 && inbox.by_hand[0].contains("8 partitions, not 16"), "{inbox:?}");
        let text = plan.to_string();
        assert!(text.contains("~ retention.ms = 60000 (1 m) -> 2678400000 (31 d)"), "{text}");
        assert!(text.contains("= groups, directory, metadata, push, layout  as wanted"), "{text}");
    }

    #[test]
    fn copies_are_never_taken_away_and_missing_ones_are_said() {
        let topology = Topology::built_in();
        let three = applied(&topology, 3);
        let one_away = cluster(2, three.topics.clone());
        assert!(topology.compare(&one_away).is_clean(), "a broker that is away changes nothing");
        let one = applied(&topology, 1);
        let plan = topology.with_replication(Some(3)).compare(&cluster(3, one.topics));
        assert!(!plan.is_clean() && !plan.has_changes(), "{plan}");
        assert!(plan.topics.iter().all(|topic| topic.by_hand.len() == 1), "{plan}");
        let short = Topology::built_in().with_replication(Some(3)).compare(&cluster(1, Vec::new()));
        assert!(short.notes.iter().any(|note| note.contains("3 brokers, and 1 are alive")), "{short}");
    }

    #[test]
    fn wrong_files_are_refused_with_their_key() {
        let with = |from: &str, to: &str| {
            assert!(BUILT_IN.contains(from), "{from}");
            Topology::parse(&BUILT_IN.replacen(from, to, 1)).expect_err(to).to_string()
        };
        assert!(with("partitions = 16", "partitions = 0").contains("inbox.partitions"));
        assert!(with("partitions = 16", "partitions = 1025").contains("inbox.partitions"));
        assert!(with("retention = \"31d\"", "retention = \"30\"").contains("30d"));
        assert!(with("retention = \"31d\"", "retention = \"0d\"").contains("30d"));
        assert!(with("# replication = 3", "replication = 0").contains("replication"));
        assert!(with("\"segment.ms\" = \"86400000\"", "\"retention.ms\" = \"1\"").contains("inbox.settings"));
        assert!(with("\"segment.ms\" = \"86400000\"", "\"cleanup.policy\" = \"compact\"").contains("compacted"));
        assert!(with("[push]", "[pull]").contains("pull"));
        assert_eq!(Retention::parse("99999999999999999999d"), None);
        assert_eq!(Retention::parse("9999999999999999d"), None);
        assert_eq!((Retention::parse("90s"), Retention::parse("forever")), (Some(Retention::Ms(90_000)), Some(Retention::Forever)));
    }
}
