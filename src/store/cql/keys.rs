//! What can't be rebuilt: one-time prekeys, identity claims, at-rest keys. Everything is a lightweight transaction; one whose outcome is
//! unknown may have spent a prekey for nobody, and never hands one out twice.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, BuildHasherDefault};

use async_trait::async_trait;
use scylla::statement::batch::{Batch, BatchStatement, BatchType};

use super::{CqlStore, applied, corrupt, unavailable};
use crate::ids::{AccountId, DeviceAddr, Identity};
use crate::limits;
use crate::store::seal::SealKey;
use crate::store::{KeyKind, KeyStore, OneTimeKey, StoreError, keyspace};

/// How often a pool is tried again that another process changed meanwhile.
const TRIES: usize = 32;

/// The key of a pool.
#[derive(Clone, Copy)]
struct Pool<'a> {
    account: &'a [u8],
    device: i8,
    kind: i8,
}

impl<'a> Pool<'a> {
    fn of(device: &'a DeviceAddr, kind: KeyKind) -> Self {
        Self { account: device.account.as_bytes(), device: device.device.get() as i8, kind: kind.number() as i8 }
    }

    const fn key(self) -> (&'a [u8], i8, i8) {
        (self.account, self.device, self.kind)
    }
}

#[async_trait]
impl KeyStore for CqlStore {
    async fn add_one_time(&self, device: DeviceAddr, kind: KeyKind, keys: Vec<OneTimeKey>) -> Result<usize, StoreError> {
        let pool = Pool::of(&device, kind);
        let fresh: BTreeMap<u32, &OneTimeKey> = keys.iter().map(|key| (key.id, key)).collect();
        let _turn = self.turn(pool).await;
        for _ in 0..TRIES {
            let left = self.left(pool).await?;
            if fresh.is_empty() {
                return Ok(left.unwrap_or(0) as usize);
            }
            let ids = self.ids(pool).await?;
            let more = fresh.keys().filter(|id| !ids.contains(&i64::from(**id))).count();
            let total = ids.len() + more;
            if total > limits::PREKEYS_PER_DEVICE {
                return Err(StoreError::LimitReached);
            }
            let put = |key: &OneTimeKey| (i64::from(key.id), keyspace::encode(key));
            let rows: Vec<_> = fresh.values().map(|key| put(key)).collect();
            if self.change(pool, left, total as i32, &rows, &[]).await? {
                return Ok(total);
            }
        }
        Err(contended())
    }

    async fn take_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<(Option<OneTimeKey>, usize), StoreError> {
        let pool = Pool::of(&device, kind);
        let _turn = self.turn(pool).await;
        for _ in 0..TRIES {
            let rows = self.rows(&self.statements.pool_first, pool.key()).await?;
            let row = rows.maybe_first_row::<(Option<i32>, Option<i64>, Option<&[u8]>)>().map_err(|error| corrupt(&error))?;
            let Some((Some(left), Some(id), Some(key))) = row else { return Ok((None, 0)) };
            let key: OneTimeKey = keyspace::decode(key, "a one-time prekey")?;
            let rest = (left - 1).max(0);
            if self.take(pool, left, rest, id).await? {
                return Ok((Some(key), rest as usize));
            }
        }
        Err(contended())
    }

    async fn first_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<Option<OneTimeKey>, StoreError> {
        let rows = self.rows(&self.statements.pool_first, Pool::of(&device, kind).key()).await?;
        let row = rows.maybe_first_row::<(Option<i32>, Option<i64>, Option<&[u8]>)>().map_err(|error| corrupt(&error))?;
        let Some((_, Some(_), Some(key))) = row else { return Ok(None) };
        keyspace::decode(key, "a one-time prekey").map(Some)
    }

    async fn count_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<usize, StoreError> {
        Ok(self.left(Pool::of(&device, kind)).await?.unwrap_or(0).max(0) as usize)
    }

    async fn remove_one_time(&self, device: DeviceAddr) -> Result<(), StoreError> {
        for kind in KeyKind::ALL {
            let pool = Pool::of(&device, kind);
            let _turn = self.turn(pool).await;
            let mut tries = 0;
            while let Some(left) = self.left(pool).await?.filter(|left| *left > 0) {
                let ids: Vec<i64> = self.ids(pool).await?.into_iter().collect();
                if self.change(pool, Some(left), 0, &[], &ids).await? {
                    break;
                }
                tries += 1;
                if tries == TRIES {
                    return Err(contended());
                }
            }
        }
        Ok(())
    }

    async fn claim_identity(&self, identity: &Identity, account: AccountId) -> Result<AccountId, StoreError> {
        let name = identity.to_string();
        for _ in 0..TRIES {
            if let Some(winner) = self.claimed(&name).await? {
                return Ok(winner);
            }
            if self.decide(&self.statements.claim, (&name, &account.as_bytes()[..])).await? {
                return Ok(account);
            }
        }
        Err(contended())
    }

    async fn release_identity(&self, identity: &Identity, account: AccountId) -> Result<(), StoreError> {
        let name = identity.to_string();
        if self.claimed(&name).await? == Some(account) {
            self.decide(&self.statements.release, (&name, &account.as_bytes()[..])).await?;
        }
        Ok(())
    }

    async fn seal_key(&self, account: AccountId, fresh: Option<SealKey>) -> Result<Option<SealKey>, StoreError> {
        let id = &account.as_bytes()[..];
        for _ in 0..TRIES {
            let rows = self.rows(&self.statements.seal_get, (id,)).await?;
            match rows.maybe_first_row::<(Option<&[u8]>, Option<bool>)>().map_err(|error| corrupt(&error))? {
                Some((Some(key), Some(false))) => {
                    let key = key.try_into().map_err(|_| corrupt(&"an at-rest key has the wrong length"))?;
                    return Ok(Some(SealKey::from_bytes(key)));
                }
                Some(_) => return Ok(None),
                None => {}
            }
            let Some(key) = &fresh else { return Ok(None) };
            self.decide(&self.statements.seal_make, (id, &key.expose()[..])).await?;
        }
        Err(contended())
    }

    async fn destroy_seal_key(&self, account: AccountId) -> Result<(), StoreError> {
        let id = &account.as_bytes()[..];
        if !self.decide(&self.statements.seal_bar, (id,)).await? {
            self.decide(&self.statements.seal_destroy, (id,)).await?;
        }
        Ok(())
    }
}

impl CqlStore {
    /// Callers of this process come one after the other to a pool.
    async fn turn(&self, pool: Pool<'_>) -> tokio::sync::MutexGuard<'_, ()> {
        let hash = BuildHasherDefault::<std::hash::DefaultHasher>::default().hash_one(pool.key());
        self.pools[hash as usize % self.pools.len()].lock().await
    }

    async fn left(&self, pool: Pool<'_>) -> Result<Option<i32>, StoreError> {
        let rows = self.rows(&self.statements.pool_get, pool.key()).await?;
        let row = rows.maybe_first_row::<(Option<i32>,)>().map_err(|error| corrupt(&error))?;
        Ok(row.and_then(|(left,)| left))
    }

    async fn ids(&self, pool: Pool<'_>) -> Result<BTreeSet<i64>, StoreError> {
        let rows = self.rows(&self.statements.pool_ids, pool.key()).await?;
        let ids = rows.rows::<(Option<i64>,)>().map_err(|error| corrupt(&error))?;
        ids.filter_map(|row| row.map(|(id,)| id).transpose()).map(|id| id.map_err(|error| corrupt(&error))).collect()
    }

    /// Changes a pool if its count still is `left`: one transaction within its partition.
    async fn change(
        &self,
        pool: Pool<'_>,
        left: Option<i32>,
        total: i32,
        put: &[(i64, Vec<u8>)],
        gone: &[i64],
    ) -> Result<bool, StoreError> {
        let (account, device, kind) = pool.key();
        let s = &self.statements;
        let mut batch = Batch::new(BatchType::Unlogged);
        let mut values: Vec<Box<dyn scylla::serialize::row::SerializeRow + Send + Sync + '_>> = Vec::new();
        match left {
            Some(left) => {
                batch.append_statement(s.pool_set.clone());
                values.push(Box::new((total, account, device, kind, left)));
            }
            None => {
                batch.append_statement(s.pool_make.clone());
                values.push(Box::new((total, account, device, kind)));
            }
        }
        for (id, key) in put {
            batch.append_statement(BatchStatement::from(s.prekey_put.clone()));
            values.push(Box::new((account, device, kind, *id, &key[..])));
        }
        for id in gone {
            batch.append_statement(BatchStatement::from(s.prekey_drop.clone()));
            values.push(Box::new((account, device, kind, *id)));
        }
        self.transact(&batch, values).await
    }

    async fn take(&self, pool: Pool<'_>, left: i32, rest: i32, id: i64) -> Result<bool, StoreError> {
        let (account, device, kind) = pool.key();
        let mut batch = Batch::new(BatchType::Unlogged);
        batch.append_statement(self.statements.pool_set.clone());
        batch.append_statement(self.statements.prekey_take.clone());
        self.transact(&batch, ((rest, account, device, kind, left), (account, device, kind, id))).await
    }

    async fn transact(&self, batch: &Batch, values: impl scylla::serialize::batch::BatchValues) -> Result<bool, StoreError> {
        let _room = self.room.acquire().await.map_err(|_| super::closed())?;
        let result = self.session.batch(batch, values).await.map_err(unavailable)?;
        applied(&result.into_rows_result().map_err(|error| corrupt(&error))?)
    }

    async fn claimed(&self, identity: &str) -> Result<Option<AccountId>, StoreError> {
        let rows = self.rows(&self.statements.claim_get, (identity,)).await?;
        let row = rows.maybe_first_row::<(&[u8],)>().map_err(|error| corrupt(&error))?;
        row.map(|(account,)| AccountId::from_slice(account).map_err(|error| corrupt(&error))).transpose()
    }
}

fn contended() -> StoreError {
    StoreError::Unavailable("too many callers change the same row at once".to_owned())
}
