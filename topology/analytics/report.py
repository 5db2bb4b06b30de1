#!/usr/bin/env python3
"""What the landed metadata says, by SQL (DuckDB): messages a day, delivery latency, who is active, what expires.

  ./report.py OUT [--json] [--from 2026-11-01] [--to 2026-11-30]
  ./report.py OUT --sql "SELECT … FROM steps"

`steps` has one row for each step; its columns are those of schemas/metadata.proto.
"""
import argparse
import json
import sys
from pathlib import Path

import duckdb

# Ephemeral messages (typing) are no messages to people; what an account sends to itself are copies for its other devices.
MESSAGES = "NOT ephemeral AND account <> sender"

QUERIES = {
    "messages_per_day": f"""
        SELECT day, count(*) FILTER (WHERE {MESSAGES}) AS messages,
               count(*) FILTER (WHERE NOT ephemeral AND account = sender) AS own_copies,
               count(*) FILTER (WHERE ephemeral) AS ephemeral,
               coalesce(sum(devices) FILTER (WHERE NOT ephemeral), 0)::BIGINT AS envelopes
        FROM steps WHERE kind = 'accepted' GROUP BY day ORDER BY day""",
    # From the edge's acceptance to the acknowledgement on the log, so the time that devices were away is in it.
    "delivery_latency_ms": """
        SELECT day, count(*) AS delivered, quantile_cont(latency_ms, 0.5) AS p50, quantile_cont(latency_ms, 0.9) AS p90,
               quantile_cont(latency_ms, 0.99) AS p99, max(latency_ms) AS max
        FROM steps WHERE kind = 'delivered' GROUP BY day ORDER BY day""",
    # An account has another pseudonym under another key: on a day on which the key changes it may count twice.
    "active_per_day": """
        WITH seen AS (
            SELECT day, key_id, sender AS account, sender_device AS device FROM steps WHERE kind = 'accepted'
            UNION SELECT day, key_id, account, device FROM steps WHERE kind = 'delivered')
        SELECT day, count(DISTINCT (key_id, account)) AS accounts, count(DISTINCT (key_id, account, device)) AS devices
        FROM seen GROUP BY day ORDER BY day""",
    # Of what was settled that day, one way or the other.
    "expiry_per_day": """
        SELECT day, count(*) FILTER (WHERE kind = 'delivered') AS delivered, count(*) FILTER (WHERE kind = 'expired') AS expired,
               round(count(*) FILTER (WHERE kind = 'expired') / count(*), 6) AS rate
        FROM steps WHERE kind IN ('delivered', 'expired') GROUP BY day ORDER BY day""",
    "sizes": f"""
        SELECT size_bucket, count(*) AS messages FROM steps WHERE kind = 'accepted' AND {MESSAGES}
        GROUP BY size_bucket ORDER BY size_bucket""",
    "accounts_per_day": """
        SELECT day, kind, count(*) AS steps FROM steps WHERE sender IS NULL GROUP BY day, kind ORDER BY day, kind""",
    "totals": f"""
        SELECT count(*) AS steps, count(DISTINCT event_id) AS distinct_steps,
               count(*) FILTER (WHERE kind = 'accepted' AND {MESSAGES}) AS accepted,
               count(*) FILTER (WHERE kind = 'delivered') AS delivered, count(*) FILTER (WHERE kind = 'expired') AS expired,
               count(*) FILTER (WHERE kind = 'rejected') AS rejected
        FROM steps""",
}


def connect(folder, since=None, until=None):
    """A database whose view `steps` is what was landed."""
    files = str(Path(folder) / "day=*" / "*.parquet")
    if not any(Path(folder).glob("day=*/*.parquet")):
        sys.exit(f"report: nothing was landed in {folder}")
    db = duckdb.connect()
    db.execute("SET VARIABLE files = ?", [files])
    db.execute("SET VARIABLE since = ?", [since or "0001-01-01"])
    db.execute("SET VARIABLE until = ?", [until or "9999-12-31"])
    db.execute("""
        CREATE VIEW steps AS SELECT * REPLACE (CAST(day AS DATE) AS day)
        FROM read_parquet(getvariable('files'), hive_partitioning = true)
        WHERE CAST(day AS DATE) BETWEEN CAST(getvariable('since') AS DATE) AND CAST(getvariable('until') AS DATE)""")
    return db


def rows(db, query):
    result = db.execute(query)
    names = [column[0] for column in result.description]
    return [dict(zip(names, row)) for row in result.fetchall()]


def table(found):
    if not found:
        return "  (none)"
    names = list(found[0])
    cells = [names] + [["" if value is None else f"{value:,.1f}" if isinstance(value, float) and value > 1 else f"{value}"
                        for value in row.values()] for row in found]
    widths = [max(len(line[at]) for line in cells) for at in range(len(names))]
    return "\n".join("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what land.py was given as --out")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--from", dest="since", help="first day")
    parser.add_argument("--to", dest="until", help="last day")
    parser.add_argument("--sql", help="a query of your own")
    arguments = parser.parse_args()
    db = connect(arguments.folder, arguments.since, arguments.until)
    queries = {"result": arguments.sql} if arguments.sql else QUERIES
    found = {name: rows(db, query) for name, query in queries.items()}
    if arguments.json:
        print(json.dumps(found, default=str))
        return
    for name, result in found.items():
        print(f"{name.replace('_', ' ')}\n{table(result)}\n")


if __name__ == "__main__":
    main()
