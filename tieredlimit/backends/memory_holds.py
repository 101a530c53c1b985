"""Renewing, releasing, settling and refunding in this process."""

from __future__ import annotations

from collections.abc import Sequence

from tieredlimit._core.quota import Quota
from tieredlimit.backends.holds import Correction, Hold, Settled, by_key
from tieredlimit.backends.memory import MemoryBackend
from tieredlimit.errors import BackendError


class MemoryHolds:
    """Look after what takes of a `MemoryBackend` have left behind; as `Holds`."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend

    async def renew(self, hold: Hold) -> bool:
        """Hold all slots for their whole lease again; False if one is lost."""
        with self._backend.lock:
            return self._backend.slots.renew(hold.id, hold.slots, self._backend.now())

    async def release(self, hold: Hold) -> bool:
        """Free the slots; False if none was held any more."""
        with self._backend.lock:
            return self._backend.slots.release(hold.id, hold.slots, self._backend.now())

    async def settle(self, record: str, corrections: Sequence[Correction]) -> Settled:
        """Correct what was charged under a record, once."""
        backend = self._backend
        with backend.lock:
            now = backend.now()
            charged = backend.records.get(record, now)
            if charged is None:
                nothing = [one._replace(us=0) for one in corrections]
                return Settled(False, self._correct(nothing, now))
            if [tag for tag, _ in charged] != [one.tag for one in corrections]:
                raise BackendError(f"{record} is of other buckets")
            bounded = [
                one._replace(us=max(one.us, -us))
                for one, (_, us) in zip(corrections, charged, strict=True)
            ]
            backend.records.drop(record)
            return Settled(True, self._correct(bounded, now))

    async def refund(self, corrections: Sequence[Correction]) -> list[int]:
        """Give back without a record, never beyond full."""
        with self._backend.lock:
            return self._correct(corrections, self._backend.now())

    async def level(self, key: str, quota: Quota) -> int:
        """Return the debt of one bucket."""
        return (await self.refund([Correction(key, quota.tag, 0, quota.clamp_us)]))[0]

    async def close(self) -> None:
        """Do nothing: what is held outlives event loops."""

    def _correct(self, corrections: Sequence[Correction], now: int) -> list[int]:
        debts: dict[str, list[int]] = {}
        for key, group in by_key(corrections).items():
            changes = [(int.from_bytes(tag, "little"), us, most) for _, tag, us, most in group]
            debts[key] = self._backend.room_of(key).correct(key, changes, now)
        return [debts[one.key].pop(0) for one in corrections]
