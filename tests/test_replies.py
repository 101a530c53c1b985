"""What a server answers is read whole, however it is cut up on the way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieredlimit.backends.replies import LONGEST, Answer, Refusal, read_replies

LINES = st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]))
ANSWERS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9),
    LINES,
    LINES.map(Refusal),
)


def spelled(answer: Answer) -> bytes:
    """Spell an answer as a server does."""
    if isinstance(answer, list):
        return b"*%d\r\n" % len(answer) + b"".join(b":%d\r\n" % number for number in answer)
    kind, text = (b"-", answer.text) if isinstance(answer, Refusal) else (b"+", answer)
    return kind + text.encode() + b"\r\n"


@given(st.lists(ANSWERS, max_size=5), st.data())
def test_answers_are_read_in_order_wherever_they_are_cut(
    answers: list[Answer], data: st.DataObject
) -> None:
    sent = b"".join(map(spelled, answers))
    read: list[Answer] = []
    unread = b""

    while sent:
        size = data.draw(st.integers(1, len(sent)))
        found, unread = read_replies(unread + sent[:size])
        read += found
        sent = sent[size:]

    assert (read, unread) == (answers, b"")


def test_what_has_not_come_yet_is_waited_for() -> None:
    assert read_replies(b"*2\r\n:1\r\n:2\r\n*1\r\n:1") == ([[1, 2]], b"*1\r\n:1")


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"*1\r\n$1\r\n1\r\n",
        b"*2\r\n:1\r\n$1\r\n1\r\n",
        b"*2\r\n:1\r\n*1\r\n:1\r\n",
        b"*0\r\n",
        b"*-1\r\n",
        b"*99999999999999999999\r\n:1\r\n",
        b"*x\r\n:1\r\n",
        b"*1\r\n:x\r\n",
        b"$-1\r\n",
        b":1\r\n",
        b"\0" * 100,
    ],
)
def test_what_is_no_reply_to_a_script_is_an_error(garbage: bytes) -> None:
    with pytest.raises(ValueError, match=r"no reply to a script|invalid literal"):
        read_replies(garbage)


def test_reply_without_an_end_is_given_up() -> None:
    with pytest.raises(ValueError, match="longer than 16,777,216 bytes"):
        read_replies(b"-" + b"x" * LONGEST)


def test_refusal_is_told_by_its_first_word() -> None:
    assert Refusal("MOVED 3999 127.0.0.1:6381").code == "MOVED"
    assert Refusal("LOADING").code == "LOADING"
