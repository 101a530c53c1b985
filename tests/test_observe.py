"""Observers: told of everything, heard by nobody who decides, and never too loud."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract import SECOND, Clock
from tieredlimit import Account, BackendError, Decision, Limiter, UsageError
from tieredlimit._core.tally import hashed_id
from tieredlimit.observe import LoggingObserver, Observer, Observers

DOCUMENTED = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text("utf-8")
EXAMPLE = Path(__file__).parent.parent / "examples" / "policy.toml"
ANN = Account("ann")
CELL = Limiter(
    {"features": {"video": {}}, "tiers": {"new": {"quotas": {"video": "5/minute"}}}}
).policy.cell("new", "video")
ALLOWED = Decision(True, "allowed", CELL, 1)
DENIED = Decision(False, "quota", CELL, 2, 12.5)
CLOSED = Decision(False, "closed", CELL, 1)


class Lines(logging.Handler):
    """Keep what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(record.getMessage()) for record in self.records]


@pytest.fixture
def lines() -> Iterator[Lines]:
    with listening("tieredlimit.events") as handler:
        yield handler


@contextmanager
def listening(name: str) -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


class Recorder:
    """Keep what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None:
        self.told.append((decision, account, shadow))

    def on_outage(self, feature: str, error: Exception) -> None:
        self.told.append((feature, error))

    def on_revision(self, number: int, digest: str) -> None:
        self.told.append((number, digest))


class Failing:
    """Fail whatever it is told."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None:
        raise self.error

    def on_outage(self, feature: str, error: Exception) -> None:
        raise self.error

    def on_revision(self, number: int, digest: str) -> None:
        raise self.error


def tell(observer: Observer, decision: Decision = DENIED, account: Account = ANN) -> None:
    observer.on_decision(decision, account, shadow=False)


class TestLoggingObserver:
    def test_denial_is_one_line_of_json_with_the_same_fields_in_the_record(
        self, lines: Lines
    ) -> None:
        tell(LoggingObserver())

        (record,) = lines.records
        assert (record.name, record.levelname) == ("tieredlimit.events", "INFO")
        assert json.loads(record.getMessage()) == {
            "event": "denied",
            "feature": "video",
            "tier": "new",
            "reason": "quota",
            "cost": 2,
            "retry_after": 12.5,
            "shadow": False,
        }
        assert record.__dict__["tieredlimit"] == lines.events[0]

    def test_denial_without_a_known_time_says_null(self, lines: Lines) -> None:
        tell(LoggingObserver(), CLOSED)

        assert lines.events[0]["retry_after"] is None

    def test_what_was_allowed_is_logged_only_if_asked(self, lines: Lines) -> None:
        tell(LoggingObserver(), ALLOWED)
        nothing = list(lines.events)

        tell(LoggingObserver(allowed=True), ALLOWED)

        assert nothing == []
        assert [event["event"] for event in lines.events] == ["allowed"]

    def test_shadow_is_said(self, lines: Lines) -> None:
        LoggingObserver().on_decision(DENIED, ANN, shadow=True)

        assert [(event["event"], event["shadow"]) for event in lines.events] == [("denied", True)]

    def test_outage_is_a_warning_that_says_why(self, lines: Lines) -> None:
        LoggingObserver().on_outage("video", BackendError("Redis did not answer"))

        assert lines.records[0].levelname == "WARNING"
        assert lines.events == [
            {"event": "outage", "feature": "video", "error": "BackendError: Redis did not answer"}
        ]

    def test_long_error_is_cut(self, lines: Lines) -> None:
        LoggingObserver().on_outage("video", BackendError("x" * 10_000))

        assert len(lines.records[0].getMessage()) < 600

    def test_revision_is_logged(self, lines: Lines) -> None:
        LoggingObserver().on_revision(18, "1b2c")

        assert lines.events == [{"event": "revision", "revision": 18, "digest": "1b2c"}]

    def test_own_logger_and_its_level_are_used(self, lines: Lines) -> None:
        own = logging.getLogger("tests.own")
        observer = LoggingObserver(own, clock=Clock(), per_second=1)

        with listening("tests.own") as handler:
            own.setLevel(logging.WARNING)
            tell(observer)
            observer.on_outage("video", BackendError("down"))
            own.setLevel(logging.INFO)
            tell(observer)

        # What was below the level has not used up the second, nor does it count as left out.
        assert [event["event"] for event in handler.events] == ["outage", "denied"]
        assert "more" not in handler.events[1]
        assert lines.records == []

    def test_flood_is_bounded_and_the_next_line_says_how_many_went_unsaid(
        self, lines: Lines
    ) -> None:
        clock = Clock()
        observer = LoggingObserver(per_second=3, clock=clock)

        for _ in range(1_000):
            tell(observer)
            clock.now += 100
        clock.now += SECOND
        tell(observer)
        tell(observer)

        assert [event.get("more") for event in lines.events] == [None, None, None, 997, None]

    def test_flood_of_denials_hides_nothing_else(self, lines: Lines) -> None:
        observer = LoggingObserver(per_second=1, allowed=True, clock=Clock())

        for _ in range(100):
            tell(observer)
        observer.on_decision(DENIED, ANN, shadow=True)
        tell(observer, ALLOWED)
        observer.on_outage("video", BackendError("down"))
        observer.on_revision(18, "1b2c")

        said = [(event["event"], event.get("shadow")) for event in lines.events]
        assert said == [
            ("denied", False),
            ("denied", True),
            ("allowed", False),
            ("outage", None),
            ("revision", None),
        ]

    @given(
        st.lists(st.tuples(st.integers(0, SECOND), st.sampled_from("dsaor")), max_size=60),
        st.integers(1, 3),
    )
    def test_every_event_is_said_or_counted(
        self, steps: list[tuple[int, str]], per_second: int
    ) -> None:
        clock, logger = Clock(), logging.getLogger("tests.own")
        observer = LoggingObserver(logger, per_second=per_second, allowed=True, clock=clock)

        def play(what: str) -> None:
            match what:
                case "o":
                    observer.on_outage("video", BackendError("down"))
                case "r":
                    observer.on_revision(1, "")
                case _:
                    decision = ALLOWED if what == "a" else DENIED
                    observer.on_decision(decision, ANN, shadow=what == "s")

        with listening("tests.own") as handler:
            for wait, what in steps:
                clock.now += wait
                play(what)
            said = len(handler.events)
            clock.now += SECOND
            for what in "dsaor":
                play(what)

        assert said <= 5 * per_second * (1 + sum(wait for wait, _ in steps) // SECOND)
        assert sum(1 + event.get("more", 0) for event in handler.events) == len(steps) + 5

    def test_account_is_never_named_unless_asked(self, lines: Lines) -> None:
        observer = LoggingObserver(allowed=True)

        for account in (ANN, Account("ann", plan="ann", tags={"ann"}, within={"org": "ann"})):
            tell(observer, DENIED, account)
            tell(observer, ALLOWED, account)
        observer.on_outage("video", ValueError("no such user: ann"))

        assert len(lines.records) == 5
        assert "ann" not in "".join(record.getMessage() for record in lines.records)
        assert lines.events[-1]["error"] == "ValueError"

    def test_account_is_hashed_as_in_the_samples_if_asked(self, lines: Lines) -> None:
        tell(LoggingObserver(ids=True, namespace="prod"))

        assert lines.events[0]["account"] == hashed_id(ANN, "prod")

    def test_account_is_named_on_one_line_if_asked(self, lines: Lines) -> None:
        observer = LoggingObserver(ids="plain")

        tell(observer)
        tell(observer, DENIED, Account("a\r\nINFO:root:all is well"))
        tell(observer, DENIED, Account("x" * 1_000_000))

        assert lines.events[0]["account"] == "ann"
        assert all("\n" not in record.getMessage() for record in lines.records)
        assert all(len(record.getMessage()) < 300 for record in lines.records)

    @pytest.mark.parametrize("wrong", ["hash", None, 2])
    def test_other_way_to_show_ids_is_refused(self, wrong: Any) -> None:
        with pytest.raises(UsageError, match='ids must be False, True or "plain"'):
            LoggingObserver(ids=wrong)

    def test_bound_that_is_none_is_refused(self) -> None:
        with pytest.raises(UsageError, match="per_second must be"):
            LoggingObserver(per_second=0)

    def test_own_clock_goes_on(self, lines: Lines) -> None:
        observer = LoggingObserver(per_second=1)

        tell(observer)

        assert len(lines.records) == 1


class TestObservers:
    def test_none_is_false(self) -> None:
        assert not Observers()
        assert Observers([Recorder()])

    def test_all_are_told_everything_in_order(self) -> None:
        first, second = Recorder(), Recorder()
        observers = Observers([first, second])
        error = BackendError("down")

        observers.on_decision(DENIED, ANN, shadow=True)
        observers.on_outage("video", error)
        observers.on_revision(18, "1b2c")

        assert first.told == [(DENIED, ANN, True), ("video", error), (18, "1b2c")]
        assert second.told == first.told

    def test_failing_observer_disturbs_neither_the_caller_nor_the_next(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        after = Recorder()
        observers = Observers([Failing(ValueError("oh")), after], clock=Clock())

        observers.on_decision(DENIED, ANN, shadow=False)
        observers.on_outage("video", BackendError("down"))
        observers.on_revision(18, "1b2c")

        assert len(after.told) == 3
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        assert "an observer failed, decisions go on: Failing: ValueError: oh\n" in caplog.text
        assert "raise self.error" in caplog.text

    def test_failures_are_logged_once_a_second(self, caplog: pytest.LogCaptureFixture) -> None:
        clock = Clock()
        observers = Observers([Failing(ValueError("x" * 10_000))], clock=clock)

        for _ in range(100):
            observers.on_revision(18, "1b2c")
        clock.now += SECOND
        observers.on_revision(18, "1b2c")

        first, second = (record.getMessage() for record in caplog.records)
        assert "more" not in first
        assert "(99 more since the last line)" in second
        assert len(second) < 2_000

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), asyncio.CancelledError()])
    def test_what_is_no_error_is_let_through(self, error: BaseException) -> None:
        with pytest.raises(type(error)):
            tell(Observers([Failing(error)]))

    @pytest.mark.parametrize("wrong", [Recorder, print, None, "on_decision"])
    def test_what_is_no_observer_is_refused(self, wrong: Any) -> None:
        with pytest.raises(UsageError, match="methods on_decision, on_outage, on_revision, got"):
            Observers([wrong])

    def test_asynchronous_observer_is_refused(self) -> None:
        class Asynchronous(Recorder):
            async def on_outage(self, feature: str, error: Exception) -> None:  # type: ignore[override]  # the fault
                ...

        wrong: Any = Asynchronous()

        with pytest.raises(UsageError, match=r"Asynchronous\.on_outage is asynchronous"):
            Observers([wrong])

    def test_logging_observer_is_an_observer(self, lines: Lines) -> None:
        tell(Observers([LoggingObserver()]))

        assert [event["event"] for event in lines.events] == ["denied"]


class TestDocumentation:
    def test_lines_shown_have_the_fields_that_are_logged(self, lines: Lines) -> None:
        (shown,) = re.findall(r"^```json\n(.*?)^```$", DOCUMENTED, re.MULTILINE | re.DOTALL)
        observer = LoggingObserver()

        tell(observer, CLOSED)
        observer.on_outage("video", BackendError("Redis did not answer within 0.1 s"))
        observer.on_revision(18, "1b2c")

        assert [json.loads(line) for line in shown.splitlines()] == lines.events

    async def test_limiter_shown_logs_its_denials(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        block = DOCUMENTED.partition("## Logs")[2].partition("```python\n")[2].partition("```")[0]
        (tmp_path / "policy.toml").write_text(EXAMPLE.read_text("utf-8"), "utf-8")
        monkeypatch.chdir(tmp_path)
        caplog.set_level("INFO", "tieredlimit.events")
        namespace: dict[str, Any] = {}

        exec(compile(block, "metrics.md", "exec"), namespace)
        await namespace["limiter"].take(Account("u1", plan="free"), "video")

        (record,) = caplog.records
        assert json.loads(record.message)["reason"] == "zero"

    def test_observer_shown_is_one(self) -> None:
        block = DOCUMENTED.rpartition("```python\n")[2].partition("```")[0]
        namespace: dict[str, Any] = {}

        exec(compile(block, "metrics.md", "exec"), namespace)

        assert Observers([namespace["Alarm"]()])
