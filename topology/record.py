"""Reads what `sealpost load --record` wrote: how long a fault was felt, and by whom."""
import struct
import uuid

# Until this long after its due time a delivery counts as undisturbed.
SLOW_S = 1.0


def rows(record):
    """What happened (a: accepted, d: delivered), when it was due (s since the epoch), how long it took (s), the recipient's account."""
    with open(record) as lines:
        for line in lines:
            what, due, took, account = line.rstrip().split(",")
            yield what, float(due) / 1000, float(took) / 1000, account


def disturbance(record, begin, end):
    """How long a fault was felt: seconds from its begin, and from its end, until the last slow one arrived."""
    found = {"accepted": 0.0, "delivered": 0.0}
    for what, due, took, _ in rows(record):
        arrived = due + took
        if took > SLOW_S and arrived > begin:
            which = "accepted" if what == "a" else "delivered"
            found[which] = max(found[which], arrived)
    return {
        **{f"{which}_slow_until_s": round(max(0.0, at - begin), 1) for which, at in found.items()},
        "recovered_after_end_s": round(max(0.0, found["delivered"] - end, found["accepted"] - end), 1),
    }


def partition(account, count):
    """Where an account's events stand: SipHash-1-3 without a key of its 16 bytes, by the number of partitions."""
    mask = (1 << 64) - 1

    def rounds(v, times):
        v0, v1, v2, v3 = v
        for _ in range(times):
            v0, v2 = (v0 + v1) & mask, (v2 + v3) & mask
            v1, v3 = (v1 << 13 | v1 >> 51) & mask ^ v0, (v3 << 16 | v3 >> 48) & mask ^ v2
            v0 = (v0 << 32 | v0 >> 32) & mask
            v2, v0 = (v2 + v1) & mask, (v0 + v3) & mask
            v1, v3 = (v1 << 17 | v1 >> 47) & mask ^ v2, (v3 << 21 | v3 >> 43) & mask ^ v0
            v2 = (v2 << 32 | v2 >> 32) & mask
        return v0, v1, v2, v3

    bytes16 = uuid.UUID(account).bytes
    v = 0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573
    for word in (*struct.unpack("<QQ", bytes16), len(bytes16) << 56):
        v0, v1, v2, v3 = rounds((v[0], v[1], v[2], v[3] ^ word), 1)
        v = v0 ^ word, v1, v2, v3
    v0, v1, v2, v3 = rounds((v[0], v[1], v[2] ^ 0xFF, v[3]), 3)
    return (v0 ^ v1 ^ v2 ^ v3) % count


def pauses(record, changes):
    """The longest delivery in each change, apart by whether its partition moved, and in the seconds before it; what was due a moment
    before the change counts to it."""
    found = []
    for what, begin, end, before, after, of_each in changes:
        stay = {one for one, owner in before.items() if owner and owner == after.get(one)}
        longest = {True: 0.0, False: 0.0, "before": 0.0}
        of = {}
        for kind, due, took, account in rows(record):
            if kind == "d" and begin - 5 <= due < begin - 0.5:
                longest["before"] = max(longest["before"], took)
            if kind == "d" and begin - 0.5 <= due < end:
                if account not in of:
                    of[account] = partition(account, len(before)) in stay
                longest[of[account]] = max(longest[of[account]], took)
        found.append({"what": what, "stayed": len(stay), "moved": len(before) - len(stay), "of_each": of_each,
                      "longest_stayed_s": round(longest[True], 3), "longest_moved_s": round(longest[False], 3),
                      "longest_before_s": round(longest["before"], 3)})
    return found
