#!/usr/bin/env python3
"""Lands topic `metadata` as Parquet files, one folder a day: OUT/day=2026-11-24/part-….parquet.

  sealpost metadata tail --json --from-start --data DIR | ./land.py --out OUT
  ./land.py --out OUT --kafka HOST:PORT[,…] [--group NAME] [--follow]

Every step is landed once, however often it is read: what has an event_id that the day holds already is dropped. So it may be
killed at any time and started again. Kafka offsets are committed only behind files that are on disk. One process for each OUT.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent.parent
SCHEMA = pa.schema([
    ("event_id", pa.string()),
    # UTC. Without a zone: DuckDB needs an extension for zones.
    ("time", pa.timestamp("ms")),
    ("kind", pa.dictionary(pa.int8(), pa.string())),
    ("key_id", pa.string()),
    ("account", pa.string()),
    ("device", pa.uint8()),
    ("sender", pa.string()),
    ("sender_device", pa.uint8()),
    ("size_bucket", pa.uint32()),
    ("urgent", pa.bool_()),
    ("ephemeral", pa.bool_()),
    ("devices", pa.uint8()),
    ("latency_ms", pa.uint64()),
    ("group", pa.string()),
], metadata={"source": "sealpost metadata, schemas/metadata.proto"})
# Records that are put into one file, and how long they may wait for others.
ROWS = 500_000
SECONDS = 30


class Problem(Exception):
    """Something that whoever runs this can do something about."""


# --- reading ---------------------------------------------------------------------------------------------------------

def row(record):
    """A row of the table from one JSON object; what is not in it is empty."""
    is_message = bool(record.get("sender"))
    return {
        "event_id": record["event_id"],
        "time": record["time_ms"],
        "kind": record["kind"],
        "key_id": record["key_id"],
        "account": record["account"],
        "device": record.get("device"),
        "sender": record.get("sender"),
        "sender_device": record.get("sender_device"),
        "size_bucket": record.get("size_bucket"),
        "urgent": record.get("urgent", False) if is_message else None,
        "ephemeral": record.get("ephemeral", False) if is_message else None,
        "devices": record.get("devices"),
        "latency_ms": record.get("latency_ms"),
        "group": record.get("group"),
    }


def from_lines(lines):
    """Rows from the output of `sealpost metadata tail --json`."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield row(json.loads(line))
            except (ValueError, KeyError) as error:
                raise Problem(f"line {number} is not a metadata record: {error!r}") from error


class Codec:
    """Reads MetadataBatch by the schema itself, so that there is no generated code to keep in step."""

    def __init__(self, schema=ROOT / "schemas" / "metadata.proto"):
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
        if not shutil.which("protoc"):
            raise Problem("protoc is needed to read the schema: install protobuf-compiler")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "metadata.bin"
            subprocess.run(["protoc", f"-I{schema.parent}", f"--descriptor_set_out={out}", str(schema)], check=True)
            files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
        pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            pool.Add(file)
        self.batch = message_factory.GetMessageClass(pool.FindMessageTypeByName("sealpost.metadata.v1.MetadataBatch"))
        self.kinds = pool.FindEnumTypeByName("sealpost.metadata.v1.MetadataKind").values_by_number

    def decode(self, payload):
        """The records of one batch, as the JSON objects that `sealpost metadata tail --json` prints."""
        for record in self.batch.FromString(payload).records:
            kind = self.kinds[record.kind].name.lower() if record.kind in self.kinds else f"kind_{record.kind}"
            out = {"event_id": record.event_id.hex(), "time_ms": record.time_ms, "kind": kind,
                   "key_id": record.key_id.hex(), "account": record.account.hex()}
            for name in ("device", "sender_device", "size_bucket", "urgent", "ephemeral", "devices"):
                if getattr(record, name):
                    out[name] = getattr(record, name)
            for name in ("sender", "group"):
                if getattr(record, name):
                    out[name] = getattr(record, name).hex()
            if kind == "delivered":
                out["latency_ms"] = record.latency_ms
            yield out


# --- landing ---------------------------------------------------------------------------------------------------------

class Landing:
    """The folder of Parquet files, and the rows that are not in it yet."""

    def __init__(self, out):
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows = []
        self.landed = self.dropped = 0
        for leftover in self.out.glob("day=*/*.tmp"):
            leftover.unlink()

    def add(self, row):
        self.rows.append(row)

    def flush(self):
        """Writes what is waiting: every file is whole and on disk, or not there."""
        if not self.rows:
            return
        table = pa.Table.from_pylist(self.rows, SCHEMA)
        days = {datetime.fromtimestamp(row["time"] / 1000, timezone.utc).date() for row in self.rows}
        for day in sorted(days):
            self.flush_day(table, day)
        self.rows.clear()

    def flush_day(self, table, day):
        folder = self.out / f"day={day}"
        folder.mkdir(exist_ok=True)
        known = "SELECT event_id FROM read_parquet(getvariable('known'))" if any(folder.glob("*.parquet")) else "SELECT NULL WHERE false"
        with duckdb.connect() as db:
            db.register("rows", table)
            db.execute("SET VARIABLE known = ?", [str(folder / "*.parquet")])
            # A step's id always comes with the same time, so its day is the only place where it can be.
            fresh = db.sql(f"""
                SELECT DISTINCT ON (event_id) * FROM rows
                WHERE CAST(time AS DATE) = CAST(? AS DATE) AND event_id NOT IN ({known}) ORDER BY time, event_id""", params=[str(day)])
            fresh = fresh.to_arrow_table().cast(SCHEMA)
            of_day = db.execute("SELECT count(*) FROM rows WHERE CAST(time AS DATE) = CAST(? AS DATE)", [str(day)]).fetchone()[0]
        self.landed += fresh.num_rows
        self.dropped += of_day - fresh.num_rows
        if fresh.num_rows == 0:
            return
        path = folder / f"part-{uuid.uuid4().hex}.parquet"
        part = path.with_suffix(".tmp")
        pq.write_table(fresh, part, compression="zstd")
        sync(part)
        part.rename(path)
        sync(folder)


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def land_lines(landing, lines):
    for row in from_lines(lines):
        landing.add(row)
        if len(landing.rows) >= ROWS:
            landing.flush()
    landing.flush()


def land_kafka(landing, arguments):
    from confluent_kafka import Consumer, KafkaError, KafkaException
    codec = Codec()
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))
    consumer = Consumer({
        "bootstrap.servers": arguments.kafka,
        "group.id": arguments.group,
        "auto.offset.reset": "earliest",
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        **dict(setting.split("=", 1) for setting in arguments.set),
    })

    def flush(reason=None, partitions=None):
        landing.flush()
        try:
            consumer.commit(asynchronous=False)
        except KafkaException as error:
            if error.args[0].code() != KafkaError._NO_OFFSET:
                raise

    # What belongs to somebody else next is landed and committed before.
    consumer.subscribe([arguments.prefix + "metadata"], on_revoke=flush)
    ended, due = set(), time.monotonic() + SECONDS
    try:
        while not stop:
            message = consumer.poll(0.5)
            assigned = {(part.topic, part.partition) for part in consumer.assignment()}
            if message is None:
                pass
            elif message.error() is None:
                ended.discard((message.topic(), message.partition()))
                for record in codec.decode(message.value()):
                    landing.add(row(record))
            elif message.error().code() == KafkaError._PARTITION_EOF:
                ended.add((message.topic(), message.partition()))
                if not arguments.follow and assigned and assigned <= ended:
                    break
            else:
                raise Problem(f"Kafka: {message.error()}")
            if len(landing.rows) >= ROWS or time.monotonic() >= due:
                flush()
                due = time.monotonic() + SECONDS
        flush()
    finally:
        consumer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the Parquet files")
    parser.add_argument("--kafka", help="read from Kafka: host:port, several with commas; else JSON lines from standard input")
    parser.add_argument("--prefix", default="", help="in front of the topic's name, as in [kafka] prefix")
    parser.add_argument("--group", default="analytics", help="consumer group")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a librdkafka setting, such as security.protocol=SSL")
    parser.add_argument("--follow", action="store_true", help="with --kafka: go on when all is landed")
    arguments = parser.parse_args()
    landing = Landing(arguments.out)
    if arguments.kafka:
        land_kafka(landing, arguments)
    else:
        land_lines(landing, sys.stdin)
    print(json.dumps({"landed": landing.landed, "dropped_repeats": landing.dropped}))


if __name__ == "__main__":
    try:
        main()
    except Problem as problem:
        sys.exit(f"land: {problem}")
