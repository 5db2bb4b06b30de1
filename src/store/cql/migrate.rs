//! `sealpost migrate`: keyspaces and tables, each change applied once.

use std::collections::BTreeMap;

use scylla::client::session::Session;
use scylla::errors::ExecutionError;
use scylla::statement::unprepared::Statement;

use super::options::{CqlOpenError, CqlOptions};
use super::refused;

/// One change of a schema.
struct Migration {
    number: i32,
    name: &'static str,
    text: &'static str,
    /// Of the state's keyspace; else of the view's.
    state: bool,
}

/// In order. What was released is never changed: a new file goes behind.
const MIGRATIONS: [Migration; 3] = [
    Migration { number: 1, name: "001_view.cql", text: include_str!("../../../schemas/cql/001_view.cql"), state: false },
    Migration { number: 2, name: "002_state.cql", text: include_str!("../../../schemas/cql/002_state.cql"), state: true },
    Migration { number: 3, name: "003_groups.cql", text: include_str!("../../../schemas/cql/003_groups.cql"), state: false },
];

/// Under this number a view's keyspace says where its state is, if that is another one.
const STATE: i32 = 0;

/// How many copies a new keyspace keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replication {
    /// One data centre: so many.
    Simple(u16),
    /// So many in each of these data centres.
    DataCentres(Vec<(String, u16)>),
}

impl std::str::FromStr for Replication {
    type Err = String;

    /// `3`, or `dc1:3,dc2:3`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is neither a number of copies nor a list of data centres like dc1:3,dc2:3");
        if let Ok(copies) = text.parse() {
            return if copies > 0 { Ok(Self::Simple(copies)) } else { Err(wrong()) };
        }
        let centre = |part: &str| {
            let (name, copies) = part.trim().split_once(':')?;
            let name_ok = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
            Some((name.to_owned(), copies.parse().ok().filter(|copies| *copies > 0 && name_ok)?))
        };
        text.split(',').map(centre).collect::<Option<Vec<_>>>().map(Self::DataCentres).ok_or_else(wrong)
    }
}

impl Replication {
    fn cql(&self) -> String {
        match self {
            Self::Simple(copies) => format!("{{'class': 'SimpleStrategy', 'replication_factor': {copies}}}"),
            Self::DataCentres(centres) => {
                let each: String = centres.iter().map(|(name, copies)| format!(", '{name}': {copies}")).collect();
                format!("{{'class': 'NetworkTopologyStrategy'{each}}}")
            }
        }
    }
}

/// What became of one migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migrated {
    /// The file below `schemas/cql`.
    pub name: &'static str,
    /// In which keyspace.
    pub keyspace: String,
    /// It was applied now; else it was there.
    pub now: bool,
}

/// Makes the keyspaces if they are missing and applies what was not applied yet. Several may run at once: each statement is one that may be
/// repeated, and a version is noted once.
pub async fn migrate(options: &CqlOptions, replication: &Replication) -> Result<Vec<Migrated>, CqlOpenError> {
    let session = options.connect().await?;
    migrate_by(&session, options, &replication.cql()).await
}

/// The same with as many copies as another keyspace of the cluster has.
pub async fn migrate_like(options: &CqlOptions, other: &str) -> Result<Vec<Migrated>, CqlOpenError> {
    let session = options.connect().await?;
    let missing = |problem: String| CqlOpenError::Schema { keyspace: other.to_owned(), problem };
    let ask = "SELECT replication FROM system_schema.keyspaces WHERE keyspace_name = ?";
    let found = session.query_unpaged(ask, (other,)).await.map_err(|error| refused(&error))?;
    let rows = found.into_rows_result().map_err(|error| CqlOpenError::Refused(error.to_string()))?;
    let row = rows.maybe_first_row::<(BTreeMap<String, String>,)>().map_err(|error| CqlOpenError::Refused(error.to_string()))?;
    let (replication,) = row.ok_or_else(|| missing("does not exist".to_owned()))?;
    let settings: Vec<String> = replication.iter().map(|(name, value)| format!("'{name}': '{value}'")).collect();
    migrate_by(&session, options, &format!("{{{}}}", settings.join(", "))).await
}

async fn migrate_by(session: &Session, options: &CqlOptions, replication: &str) -> Result<Vec<Migrated>, CqlOpenError> {
    check_state(session, options).await?;
    for keyspace in [&options.keyspace, &options.state_keyspace] {
        let make = format!("CREATE KEYSPACE IF NOT EXISTS {keyspace} WITH replication = {replication}");
        run(session, &make).await?;
        run(session, &format!("CREATE TABLE IF NOT EXISTS {keyspace}.schema_versions (version int PRIMARY KEY, name text)")).await?;
    }
    let mut done = Vec::new();
    for migration in &MIGRATIONS {
        let keyspace = if migration.state { &options.state_keyspace } else { &options.keyspace };
        let there = versions(session, keyspace).await.map_err(|error| refused(&error))?.contains(&migration.number);
        if !there {
            for statement in statements(migration.text) {
                run(session, &statement.replacen("EXISTS ", &format!("EXISTS {keyspace}."), 1)).await?;
            }
            let note = format!("INSERT INTO {keyspace}.schema_versions (version, name) VALUES (?, ?) IF NOT EXISTS");
            session.query_unpaged(note, (migration.number, migration.name)).await.map(drop).map_err(|error| refused(&error))?;
        }
        done.push(Migrated { name: migration.name, keyspace: keyspace.clone(), now: !there });
    }
    if options.state_keyspace != options.keyspace {
        let note = format!("INSERT INTO {}.schema_versions (version, name) VALUES (?, ?) IF NOT EXISTS", options.keyspace);
        session.query_unpaged(note, (STATE, &options.state_keyspace)).await.map(drop).map_err(|error| refused(&error))?;
    }
    Ok(done)
}

/// Removes keyspaces with all that is in them; for tests.
#[cfg(any(test, feature = "test-util"))]
pub async fn drop_keyspaces(options: &CqlOptions) -> Result<(), CqlOpenError> {
    let session = options.connect().await?;
    for keyspace in [&options.keyspace, &options.state_keyspace] {
        run(&session, &format!("DROP KEYSPACE IF EXISTS {keyspace}")).await?;
    }
    Ok(())
}

/// The same for all whose names begin with the view's and an underscore, too.
#[cfg(any(test, feature = "test-util"))]
pub async fn drop_keyspaces_of(options: &CqlOptions) -> Result<(), CqlOpenError> {
    let session = options.connect().await?;
    let found = session.query_unpaged("SELECT keyspace_name FROM system_schema.keyspaces", ()).await.map_err(|error| refused(&error))?;
    let rows = found.into_rows_result().map_err(|error| CqlOpenError::Refused(error.to_string()))?;
    let names = rows.rows::<(String,)>().map_err(|error| CqlOpenError::Refused(error.to_string()))?;
    for (name,) in names.flatten() {
        if name == options.keyspace || name == options.state_keyspace || name.starts_with(&format!("{}_", options.keyspace)) {
            run(&session, &format!("DROP KEYSPACE IF EXISTS {name}")).await?;
        }
    }
    Ok(())
}

/// That both keyspaces are as this binary needs them.
pub(super) async fn check(session: &Session, options: &CqlOptions) -> Result<(), CqlOpenError> {
    check_state(session, options).await?;
    for migration in &MIGRATIONS {
        let keyspace = if migration.state { &options.state_keyspace } else { &options.keyspace };
        let problem = match versions(session, keyspace).await {
            Ok(versions) if versions.contains(&migration.number) => continue,
            Ok(_) => format!("lacks {}", migration.name),
            Err(error) => format!("does not exist or can't be read ({error})"),
        };
        return Err(CqlOpenError::Schema { keyspace: keyspace.clone(), problem });
    }
    Ok(())
}

/// A view whose state is elsewhere is never opened with another one: one-time prekeys and at-rest keys would seem to be gone.
async fn check_state(session: &Session, options: &CqlOptions) -> Result<(), CqlOpenError> {
    let ask = format!("SELECT name FROM {}.schema_versions WHERE version = ?", options.keyspace);
    // What is not there yet says nothing.
    let Ok(found) = session.query_unpaged(ask, (STATE,)).await else { return Ok(()) };
    let rows = found.into_rows_result().map_err(|error| CqlOpenError::Refused(error.to_string()))?;
    let noted = rows.maybe_first_row::<(String,)>().map_err(|error| CqlOpenError::Refused(error.to_string()))?;
    match noted {
        Some((state,)) if state != options.state_keyspace => {
            Err(CqlOpenError::State { keyspace: options.keyspace.clone(), state, asked: options.state_keyspace.clone() })
        }
        _ => Ok(()),
    }
}

async fn versions(session: &Session, keyspace: &str) -> Result<Vec<i32>, ExecutionError> {
    let found = session.query_unpaged(format!("SELECT version FROM {keyspace}.schema_versions"), ()).await?;
    let rows = found.into_rows_result().ok();
    let versions = rows.as_ref().and_then(|rows| rows.rows::<(i32,)>().ok());
    Ok(versions.map(|rows| rows.flatten().map(|(version,)| version).collect()).unwrap_or_default())
}

async fn run(session: &Session, statement: &str) -> Result<(), CqlOpenError> {
    let mut statement = Statement::new(statement);
    // A table takes a cluster a while, and all of it has to agree.
    statement.set_request_timeout(Some(std::time::Duration::from_secs(60)));
    session.query_unpaged(statement, ()).await.map(drop).map_err(|error| refused(&error))
}

/// The statements of a file: without comments, ended by semicolons.
fn statements(text: &str) -> Vec<String> {
    let code: String = text.lines().map(|line| line.split("--").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    code.split(';').map(|statement| statement.trim().to_owned()).filter(|statement| !statement.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_statement_may_be_repeated_and_takes_a_keyspace() {
        for migration in &MIGRATIONS {
            let statements = statements(migration.text);
            assert!(!statements.is_empty());
            for statement in statements {
                assert!(statement.starts_with("CREATE TABLE IF NOT EXISTS "), "{statement}");
            }
        }
        assert!(MIGRATIONS.windows(2).all(|pair| pair[0].number < pair[1].number));
    }

    #[test]
    fn replication_is_a_number_or_data_centres() {
        assert_eq!("3".parse(), Ok(Replication::Simple(3)));
        let two = "dc1:3, dc2:2".parse::<Replication>().expect("valid");
        assert_eq!(two.cql(), "{'class': 'NetworkTopologyStrategy', 'dc1': 3, 'dc2': 2}");
        for wrong in ["", "0", "dc1", "dc1:0", "dc1:x", "a'b:1"] {
            assert!(wrong.parse::<Replication>().is_err(), "{wrong}");
        }
    }
}
