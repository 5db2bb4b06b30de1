//! The embedded stores do what every store must.

use std::sync::Arc;

use async_trait::async_trait;
use sealpost::store::conformance::{self, Fixture, Stores};
use sealpost::store::embedded::{EmbeddedStore, Options};

struct Embedded(tempfile::TempDir);

#[async_trait]
impl Fixture for Embedded {
    async fn open(&self) -> Stores {
        let store: Arc<EmbeddedStore> = EmbeddedStore::open(self.0.path(), Options::default()).expect("opens");
        Stores::of(&store)
    }
}

fn embedded() -> Embedded {
    Embedded(tempfile::tempdir().expect("a temporary folder"))
}

macro_rules! suite {
    ($($name:ident),*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            conformance::$name(&embedded()).await.expect("no store call fails");
        })*
    };
}

suite!(
    delivery,
    delivery_removal,
    delivery_expiry,
    directory,
    groups,
    group_items,
    group_states,
    group_members,
    group_expiry,
    group_walk,
    one_time_keys,
    one_time_keys_are_taken_once,
    claims,
    seal_keys,
    everything
);
