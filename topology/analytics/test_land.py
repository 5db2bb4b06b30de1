#!/usr/bin/env python3
"""Tests of land.py and report.py: `python3 -m unittest` in this folder. tests/metadata.rs runs them, too."""
import hmac
import json
import shutil
import tempfile
import unittest
import uuid
from pathlib import Path

import land
import report

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
PERIOD_MS = 30 * 24 * 3600 * 1000
DAY_MS = 24 * 3600 * 1000
NOON = 1_700_000_000_000 // DAY_MS * DAY_MS + DAY_MS // 2


def step(number, kind="delivered", time_ms=NOON, **more):
    message = {"sender": "b" * 32, "sender_device": 1, "size_bucket": 160} if kind in ("accepted", "delivered", "expired") else {}
    return {"event_id": f"{number:032x}", "time_ms": time_ms, "kind": kind, "key_id": "0" * 16, "account": "a" * 32, **message, **more}


class Schema(unittest.TestCase):
    """The broker's tests hold the same vectors."""

    def test_pseudonyms_are_derived_as_the_schema_says(self):
        secret = bytes([1]) * 32
        for vector in GOLDEN["pseudonyms"]:
            period = vector["time_ms"] // PERIOD_MS * PERIOD_MS
            key = hmac.digest(secret, b"sealpost metadata" + period.to_bytes(8, "big"), "sha256")
            self.assertEqual(hmac.digest(key, b"key id", "sha256")[:8].hex(), vector["key_id"])
            self.assertEqual(hmac.digest(key, uuid.UUID(vector["account"]).bytes, "sha256")[:16].hex(), vector["pseudonym"])
            group = b"group" + uuid.UUID(vector["account"]).bytes
            self.assertEqual(hmac.digest(key, group, "sha256")[:16].hex(), vector["group"])

    @unittest.skipUnless(shutil.which("protoc"), "protoc is not installed")
    def test_batches_read_the_same_as_the_brokers_own_json(self):
        batch = GOLDEN["batch"]
        self.assertEqual(list(land.Codec().decode(bytes.fromhex(batch["bytes"]))), batch["records"])


class Landing(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.out = Path(folder.name)

    def land(self, steps):
        landing = land.Landing(self.out)
        land.land_lines(landing, [json.dumps(step) for step in steps])
        return landing.landed, landing.dropped

    def totals(self):
        return report.rows(report.connect(self.out), report.QUERIES["totals"])[0]

    def test_repeats_are_dropped_within_a_run_and_between_runs(self):
        steps = [step(number, latency_ms=number) for number in range(100)]
        self.assertEqual(self.land(steps + steps[:10]), (100, 10))
        self.assertEqual(self.land(steps[50:] + [step(100)]), (1, 50))
        self.assertEqual((self.totals()["steps"], self.totals()["distinct_steps"]), (101, 101))

    def test_days_are_folders_and_what_a_crash_left_goes(self):
        self.land([step(1), step(2, time_ms=NOON + DAY_MS)])
        folders = sorted(self.out.glob("day=*"))
        self.assertEqual([folder.name for folder in folders], ["day=2023-11-14", "day=2023-11-15"])
        (folders[0] / "part-half.tmp").write_bytes(b"PAR1")
        self.assertEqual(self.land([step(1)]), (0, 1))
        self.assertFalse(list(self.out.glob("day=*/*.tmp")))

    def test_lines_that_are_no_records_are_named(self):
        with self.assertRaisesRegex(land.Problem, "line 2"):
            land.land_lines(land.Landing(self.out), [json.dumps(step(1)), "{}"])

    def test_the_report_counts(self):
        self.land([
            step(1, "accepted", devices=2), step(2, "accepted", devices=1, sender="c" * 32), step(3, "accepted", devices=1, account="b" * 32),
            step(4, "accepted", ephemeral=True, devices=1), step(5, latency_ms=10, device=1), step(6, latency_ms=30, device=2),
            step(7, "expired", device=3), step(8, "account_created"),
        ])
        db = report.connect(self.out)
        found = {name: report.rows(db, query) for name, query in report.QUERIES.items()}
        day = found["messages_per_day"][0]
        self.assertEqual((day["messages"], day["own_copies"], day["ephemeral"], day["envelopes"]), (2, 1, 1, 4))
        latency = found["delivery_latency_ms"][0]
        self.assertEqual((latency["delivered"], latency["p50"], latency["max"]), (2, 20, 30))
        # Senders b.1, c.1; recipients a.1 and a.2.
        active = found["active_per_day"][0]
        self.assertEqual((active["accounts"], active["devices"]), (3, 4))
        expiry = found["expiry_per_day"][0]
        self.assertEqual((expiry["delivered"], expiry["expired"], expiry["rate"]), (2, 1, 0.333333))
        self.assertEqual(found["accounts_per_day"][0]["kind"], "account_created")
        self.assertEqual(report.rows(report.connect(self.out, until="2023-11-13"), report.QUERIES["totals"])[0]["steps"], 0)


if __name__ == "__main__":
    unittest.main()
