"""What is in force in a process: revisions, what is closed here alone, and what is broken."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract import HOUR, START, Clock
from tests.test_backends import Untouched
from tests.test_override import close_for
from tieredlimit import Account, BackendError, Policy, UsageError, overrides
from tieredlimit._core.override import Override
from tieredlimit._core.revision import Revision
from tieredlimit._core.tally import Samples, Tallies
from tieredlimit._core.who import EVERYONE, Who
from tieredlimit.backends import Backend, MemoryBackend
from tieredlimit.backends.backend import StaleError
from tieredlimit.closures import read_closures
from tieredlimit.complaints import Complaints
from tieredlimit.inforce import InForce, Stored, stored

DOCUMENT: dict[str, Any] = {
    "order": ["new", "everyone"],
    "features": {"image": {"routes": ["POST /images"]}, "video": {"routes": ["POST /videos"]}},
    "defaults": {"quotas": {"image": "5/minute", "video": "3/hour"}},
    "tiers": {"new": {"when": {"plan": "free"}}, "everyone": {}},
}
OTHER = {**DOCUMENT, "defaults": {"quotas": {"image": "9/minute", "video": "unlimited"}}}
OTHER_WITH_AUDIO: dict[str, Any] = {
    **DOCUMENT,
    "features": {**DOCUMENT["features"], "audio": {}},
    "defaults": {"quotas": {**DOCUMENT["defaults"]["quotas"], "audio": "1/day"}},
}
POLICY = Policy.from_dict(DOCUMENT)

BROKEN: dict[str, Any] = {"features": {}, "tiers": {"everyone": {"quotas": {"audio": 1}}}}

NEW = Who(tier="new")
ANN = Account("ann", plan="free")
BEN = Account("ben")


class Held:
    """An `InForce`, its clock, and the revisions that it said it follows."""

    def __init__(
        self,
        policy: Policy | Stored = POLICY,
        *,
        backend: Backend | None = None,
        close: str = "",
        close_file: Path | None = None,
    ) -> None:
        self.clock = Clock()
        self.changed: list[int] = []
        self.tallies = Tallies()
        self.force = InForce(
            policy,
            backend or MemoryBackend(clock=self.clock),
            "test",
            1,
            close=close,
            close_file=close_file,
            tallies=self.tallies,
            samples=Samples("test"),
            # Each complaint is heard, however soon it follows another.
            complaints=Complaints(Seconds()),
            changed=lambda revision: self.changed.append(revision.number),
        )

    def closed(self, account: Account, feature: str = "video") -> bool:
        table = self.force.table_at(self.clock())
        entry = table.find(account, feature, self.clock())
        assert entry is not None
        return entry.closure is not None

    def capacity(self, feature: str = "image") -> int | None:
        return self.force.table_at(self.clock()).entry("everyone", feature).most

    async def publish(self, following: Revision) -> None:
        store = self.force.store
        assert store is not None
        await store.publish(following, seen=await store.head())

    async def do(self, operation: Callable[..., overrides.Change], *given: Any, **more: Any) -> int:
        store = self.force.store
        assert store is not None
        change = operation(await store.head(), *given, now=self.clock(), **more)
        await self.publish(change.revision)
        return change.revision.number


class Seconds:
    """A clock on which a second passes with each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


def only(*closed: Override, number: int = 1, base: Any = None) -> Revision:
    return Revision(number, base, closed)


class TestAdopting:
    def test_newer_revision_is_followed_and_an_older_one_is_not(self) -> None:
        held = Held()

        held.force.adopt(only(close_for(NEW), number=4))
        held.force.adopt(only(number=3))
        held.force.adopt(only(close_for(NEW), number=4))

        assert held.closed(ANN)
        assert not held.closed(BEN)
        assert held.force.revision.number == 4
        assert held.changed == [4]

    @pytest.mark.fault("G6")
    def test_other_content_of_the_same_number_is_followed(self) -> None:
        held = Held()
        held.force.adopt(only(close_for(NEW), number=4))

        held.force.adopt(only(close_for(EVERYONE), number=4))

        assert held.closed(BEN)
        assert held.changed == [4, 4]

    async def test_memory_is_looked_at_with_every_question(self) -> None:
        held = Held()

        await held.do(overrides.close, POLICY, "video", NEW)

        assert held.closed(ANN)
        assert held.changed == [1]

    @pytest.mark.fault("G3")
    async def test_table_is_for_the_instant_that_is_asked_about(self) -> None:
        held = Held()
        begin, end = START + HOUR, START + 2 * HOUR
        await held.do(overrides.close, POLICY, "video", NEW, begin_us=begin, end_us=end)
        said = []

        for now in (begin - 1, begin, end - 1, end, begin):
            held.clock.now = now
            said.append(held.closed(ANN))

        assert said == [False, True, True, False, True]
        assert held.changed == [1]

    async def test_counting_begins_anew_with_each_revision(self) -> None:
        held = Held()
        tally = held.tallies.of("video", "new")
        tally.allowed += 3
        await held.do(overrides.close, POLICY, "video", NEW)

        held.closed(ANN)
        tally.closed += 2

        beat = held.force.heartbeat()
        assert beat.revision == 1
        assert beat.counters["since"] == {"video/new": {"closed": 2}}
        assert beat.counters["cells"] == {"video/new": {"allowed": 3, "closed": 2}}
        assert beat.pid == os.getpid()
        assert held.force.heartbeat().id == beat.id


class TestBrokenRevisions:
    @pytest.mark.fault("G2")
    async def test_broken_policy_leaves_the_one_in_force_and_is_reported(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        held = Held()
        await held.do(overrides.push, OTHER)
        assert held.capacity() == 9

        await held.publish(only(number=2, base=BROKEN))

        assert held.capacity() == 9
        assert held.force.revision.number == 2
        assert "revision 2 cannot be used: what was in force stays: PolicyError" in caplog.text

    @pytest.mark.fault("G2", "G5")
    async def test_closure_above_a_broken_policy_closes(self) -> None:
        held = Held()
        await held.publish(only(base=BROKEN))
        assert not held.closed(ANN)

        await held.publish(only(close_for(NEW), number=2, base=BROKEN))

        assert held.closed(ANN)
        assert not held.closed(BEN)

    @pytest.mark.fault("G2", "G5")
    async def test_quotas_that_cannot_be_read_leave_the_overrides_in_force(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        held = Held()
        await held.publish(only(close_for(NEW)))
        unread = Override("set-2", 2, "set", "image", EVERYONE, quotas="5/fortnight")

        held.force.adopt(only(unread, number=2))

        assert held.force.revision.number == 2
        assert held.force.table_at(START).overrides.keys() == {"video"}
        assert "revision 2 cannot be used" in caplog.text

    @pytest.mark.fault("G2")
    async def test_next_good_revision_is_followed(self) -> None:
        held = Held()
        await held.publish(only(base=BROKEN))
        held.closed(ANN)

        await held.do(overrides.push, OTHER)

        assert held.capacity() == 9

    async def test_stored_policy_that_was_never_good_is_none(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        held = Held(stored())
        await held.publish(only(base=BROKEN))

        with pytest.raises(BackendError, match='no policy is stored in the namespace "test"'):
            await held.force.open()

        assert held.force.table is None
        assert "revision 1 cannot be used" in caplog.text

    async def test_stored_policy_that_was_taken_away_stays(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        held = Held(stored())
        await held.do(overrides.push, OTHER)
        await held.force.open()

        await held.publish(only(close_for(NEW), number=2))

        assert held.capacity() == 9
        assert held.closed(ANN)
        assert "revision 2 has no stored policy" in caplog.text


class TestLocalClosures:
    def test_feature_for_a_tier_and_another_for_everyone(self) -> None:
        held = Held(close="video:new, image,")

        assert held.closed(ANN)
        assert not held.closed(BEN)
        assert held.closed(BEN, "image")

    @pytest.mark.fault("G5")
    async def test_win_over_everything_that_is_published(self) -> None:
        held = Held(close="video:new")
        more = [
            Override("open-1", 1, "open", "video", Who(account="ann"), no_exceptions=True),
            Override("set-2", 2, "set", "video", NEW, quotas="unlimited", no_exceptions=True),
        ]

        await held.publish(only(*more, number=2))

        assert held.closed(ANN)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("vidoe", r'^HERE: unknown feature "vidoe"; did you mean "video"\?'),
            ("video:now", r'^HERE: unknown tier "now"; did you mean "new"\?'),
            (":new", r'^HERE: unknown feature ""'),
            ("video:new:x", r'^HERE: unknown tier "new:x"'),
        ],
    )
    def test_name_that_is_unknown_is_an_error(self, text: str, said: str) -> None:
        with pytest.raises(UsageError, match=said):
            read_closures(text, "HERE", POLICY)

    def test_beside_a_stored_policy_any_name_is_taken(self) -> None:
        read = read_closures("video:gold", "HERE", None)

        assert [(one.feature, one.who, one.reason) for one in read] == [
            ("video", Who(tier="gold"), "HERE")
        ]


class TestFile:
    def test_need_not_exist(self, tmp_path: Path) -> None:
        assert not Held(close_file=tmp_path / "close").closed(ANN)

    def test_what_appears_changes_and_vanishes_counts(self, tmp_path: Path) -> None:
        file = tmp_path / "close"
        held = Held(close_file=file)
        said = []

        for text in ("# at 02:00\nvideo:new   # by ann\n\n", "video\n", "image:new, video", None):
            if text is None:
                file.unlink()
            else:
                file.write_text(text)
            held.force._read_file()
            said.append((held.closed(ANN), held.closed(BEN), held.closed(ANN, "image")))

        assert said == [
            (True, False, False), (True, True, False), (True, True, True), (False, False, False),
        ]  # fmt: skip
        assert held.changed == [0, 0, 0, 0]

    async def test_stands_above_revisions_that_come_and_go(self, tmp_path: Path) -> None:
        file = tmp_path / "close"
        file.write_text("video:new")
        held = Held(close_file=file)

        await held.do(overrides.close, POLICY, "image", NEW)
        await held.do(overrides.open_, POLICY, "image", NEW)

        assert held.closed(ANN)
        assert not held.closed(ANN, "image")
        assert held.force.revision.number == 2

    def test_line_that_is_wrong_is_reported_and_the_others_close(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = tmp_path / "close"
        file.write_text("vidoe:new\nimage\n")

        held = Held(close_file=file)

        assert held.closed(BEN, "image")
        assert not held.closed(ANN)
        assert f'{file}: "vidoe:new" closes nothing under the policy in force' in caplog.text

    @pytest.mark.fault("G5")
    async def test_names_are_those_of_the_policy_in_force(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = tmp_path / "close"
        file.write_text("audio, video:gold, image")
        held = Held(close_file=file)
        before = caplog.text
        caplog.clear()

        await held.do(overrides.push, OTHER_WITH_AUDIO)

        assert held.closed(ANN, "audio")
        assert '"audio" closes nothing under' in before
        assert '"audio"' not in caplog.text
        assert '"video:gold" closes nothing under' in caplog.text

    async def test_slip_is_reported_once_a_stored_policy_says_that_it_is_one(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = tmp_path / "close"
        file.write_text("imgae")
        held = Held(stored(), close="vidoe:new", close_file=file)
        before = caplog.text

        await held.do(overrides.push, OTHER)

        assert "closes nothing" not in before
        assert 'TIEREDLIMIT_CLOSE: "vidoe:new" closes nothing under' in caplog.text
        assert (
            f'{file}: "imgae" closes nothing under the policy in force: UsageError' in caplog.text
        )

    def test_spaces_and_the_mark_of_an_editor_are_no_part_of_a_name(self, tmp_path: Path) -> None:
        file = tmp_path / "close"
        file.write_bytes(b"\xef\xbb\xbfvideo : new\r\n")

        held = Held(close_file=file)

        assert held.closed(ANN)
        assert not held.closed(BEN)

    @pytest.mark.parametrize("how", ["a folder", "no text"])
    def test_what_cannot_be_read_leaves_closed_what_is(
        self, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = tmp_path / "close"
        file.write_text("video:new")
        held = Held(close_file=file)
        file.unlink()
        if how == "a folder":
            file.mkdir()
        else:
            file.write_bytes(b"\xff\xfe")

        held.force._read_file()

        assert held.closed(ANN)
        assert f"{file} cannot be read: what it closed stays closed" in caplog.text

    def test_no_more_than_so_much_of_it_is_read(self, tmp_path: Path) -> None:
        file = tmp_path / "close"
        file.write_text("video:new\n" + "#" * 70_000 + "\nimage\n")

        held = Held(close_file=file)

        assert held.closed(ANN)
        assert not held.closed(ANN, "image")

    def test_same_file_is_not_taken_in_twice(self, tmp_path: Path) -> None:
        file = tmp_path / "close"
        file.write_text("video:new")
        held = Held(close_file=file)
        table = held.force.table

        held.force._read_file()

        assert held.force.table is table


class TestBackends:
    def test_own_backend_has_no_revisions(self) -> None:
        held = Held(backend=Untouched())

        assert held.force.store is None

    def test_stored_policy_needs_a_store(self) -> None:
        with pytest.raises(UsageError, match=r"a stored policy needs .*, got Untouched"):
            Held(stored(), backend=Untouched())

    async def test_without_a_policy_there_is_no_table(self) -> None:
        held = Held(stored())

        with pytest.raises(BackendError, match="the stored policy was not loaded yet"):
            held.force.table_at(START)

    def test_event_loops_that_have_ended_are_forgotten(self, tmp_path: Path) -> None:
        held = Held(close_file=tmp_path / "close")

        async def use() -> int:
            held.force.follow()
            held.force.follow()
            await held.force._followers[asyncio.get_running_loop()].refresh()
            return len(held.force._followers)

        assert [asyncio.run(use()) for _ in range(4)] == [1] * 4

    async def test_what_somebody_else_has_loaded_meanwhile_is_not_loaded_again(
        self, tmp_path: Path
    ) -> None:
        held = Held(close_file=tmp_path / "close")
        held.force.adopt(only(close_for(NEW), number=4))

        await held.force.catch_up(StaleError("newer", 4, START))

        assert not held.force._followers

    def test_threads_that_adopt_at_once_end_on_the_newest(self) -> None:
        held = Held()
        revisions = [only(close_for(NEW), number=number) for number in range(1, 40)]
        start = threading.Barrier(4)

        def adopt(order: list[Revision]) -> None:
            start.wait()
            for one in order:
                held.force.adopt(one)

        orders = [revisions, revisions[::-1], revisions[::2], revisions[1::2]]
        threads = [threading.Thread(target=adopt, args=(order,)) for order in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert held.force.revision.number == 39
        assert held.force.table is not None
        assert held.force.table.standing[0] == 39


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "tieredlimit")
