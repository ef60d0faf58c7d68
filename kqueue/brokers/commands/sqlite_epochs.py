"""Who is alive, by what stands in `kq_epoch`. Epochs lapse by the time since the host's boot; one of another boot is dead.

Nobody can renew while the store is away: the host sleeps, all its processes are frozen, or somebody holds the file locked. That
is not the fault of those who hold leases, so the first who renews or sweeps afterwards, and finds that nobody did for half a
lease, gives every epoch a lease from then on.
"""

from __future__ import annotations

from typing import Any, Final

from ..base import Owner
from .sqlite_transaction import Transaction

# Of a row; parameters: boot, ticks, now. An expiry that is no number, or out of reach, has passed.
_MOMENT: Final = 0.1  # of a lease; with a third between two renewals, less than half a lease in all
_ALIVE: Final = """CASE WHEN boot IS NULL THEN typeof(expires_at) IN ('real', 'integer') AND expires_at > :now
      AND expires_at < :now + 1e9
    ELSE boot = :boot AND typeof(lapses_at) IN ('real', 'integer') AND lapses_at > :ticks AND lapses_at < :ticks + 1e9 END"""
_REGISTER: Final = """INSERT INTO kq_epoch (epoch, identity, expires_at, boot, lapses_at, lease_s, lapsed)
    VALUES (:epoch, :identity, :now + :lease_s, :boot, :ticks + :lease_s, :lease_s, :lapsed)
    ON CONFLICT (epoch) DO UPDATE SET identity = excluded.identity, expires_at = excluded.expires_at, boot = excluded.boot,
    lapses_at = excluded.lapses_at, lease_s = excluded.lease_s, lapsed = excluded.lapsed"""
_REVIVE: Final = f"{_REGISTER} WHERE NOT ({_ALIVE})"
_PROLONG: Final = """UPDATE kq_epoch SET expires_at = :now + lease_s, lapses_at = :ticks + lease_s
    WHERE boot = :boot AND lapses_at <> 0 AND lapses_at < :ticks + lease_s"""
_WAS_ALIVE: Final = f"SELECT lapsed FROM kq_epoch WHERE epoch = :epoch AND {_ALIVE}"


def renew(tx: Transaction, owner: Owner, lease_s: float) -> bool:
    """Let `owner` live for another lease. Whether it was alive all the time since it was last asked."""
    found = tx.db.execute(_WAS_ALIVE, {**_moment(tx), "epoch": owner.epoch}).fetchone()
    beat(tx, lease_s)
    tx.db.execute(_REGISTER, _registration(tx, owner, lease_s, lapsed=False))
    return found is not None and not found[0]


def revive(tx: Transaction, owner: Owner, lease_s: float) -> None:
    """Let `owner`, who has leased something, not be dead. Its next renewal will say that it was."""
    tx.db.execute(_REVIVE, {**_moment(tx), **_registration(tx, owner, lease_s, lapsed=True)})


def close_epoch(tx: Transaction, epoch: str) -> None:
    """Whatever `epoch` still holds may be recovered at once."""
    tx.db.execute("UPDATE kq_epoch SET expires_at = ?, lapses_at = 0 WHERE epoch = ?", (tx.now, epoch))


def living(tx: Transaction) -> set[str]:
    return {epoch for (epoch,) in tx.db.execute(f"SELECT epoch FROM kq_epoch WHERE {_ALIVE}", _moment(tx))}


def known(tx: Transaction) -> list[str]:
    return [epoch for (epoch,) in tx.db.execute("SELECT epoch FROM kq_epoch")]


def earlier(tx: Transaction, owner: Owner) -> list[str]:
    """The epochs that `owner` proves to be dead."""
    same = "SELECT epoch FROM kq_epoch WHERE identity = ? AND identity <> '' AND epoch <> ?"
    return [epoch for (epoch,) in tx.db.execute(same, (owner.identity, owner.epoch))]


def beat(tx: Transaction, lease_s: float) -> None:
    """Note that somebody renews or sweeps. When nobody could for half a lease, everybody gets another.

    One that was noted a moment ago will do, so that the sweep after a renewal writes nothing, and waits for no disk.
    """
    last = _last_beat(tx)
    if last is not None and 0 <= tx.ticks - last < lease_s * _MOMENT:
        return
    if last is not None and tx.ticks - last > lease_s / 2:
        tx.db.execute(_PROLONG, _moment(tx))
    tx.db.execute("INSERT OR REPLACE INTO kq_meta (key, value) VALUES ('beat', ?)", (f"{tx.ticks:.3f} {tx.boot}",))


def _last_beat(tx: Transaction) -> float | None:
    """Seconds of this boot; None: there was none in it."""
    found = tx.db.execute("SELECT value FROM kq_meta WHERE key = 'beat'").fetchone()
    ticks, _, boot = ("" if found is None else str(found[0])).partition(" ")
    try:
        return float(ticks) if boot == tx.boot else None
    except ValueError:
        return None


def _moment(tx: Transaction) -> dict[str, Any]:
    return {"now": tx.now, "boot": tx.boot, "ticks": tx.ticks}


def _registration(tx: Transaction, owner: Owner, lease_s: float, lapsed: bool) -> dict[str, Any]:
    fields = {"epoch": owner.epoch, "identity": owner.identity, "lease_s": lease_s, "lapsed": int(lapsed)}
    return {**_moment(tx), **fields}
