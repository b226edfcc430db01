from __future__ import annotations

import pytest

from streamrec.errors import ConfigError
from streamrec.events import DeadLetter
from streamrec.preprocessors.dead_letters import DeadLetters
from streamrec.protocols import Stateful
from streamrec.testing._state import check_state_is_plain, copy_state, same_state


def letter(n: int, reason: str = "malformed: JSON is malformed") -> DeadLetter:
    return DeadLetter({"path": "a.jsonl", "offset": n}, reason, b"{" * n)


def test_the_newest_are_kept_and_all_are_counted() -> None:
    letters = DeadLetters(capacity=3, max_raw=4)
    for n in range(5):
        letters.add(letter(n))
    letters.add(letter(9, "bad time: nan"))
    assert [kept.position["offset"] for kept in letters] == [3, 4, 9]
    assert [len(kept.raw) for kept in letters] == [3, 4, 4]
    assert len(letters) == 3 and letters.total == 6
    assert letters.counts == {"malformed": 5, "bad time": 1}


def test_none_need_be_kept() -> None:
    letters = DeadLetters(capacity=0)
    letters.add(letter(1))
    assert list(letters) == [] and letters.total == 1


def test_listeners_hear_every_letter_whole() -> None:
    letters = DeadLetters(capacity=0, max_raw=2)
    heard: list[DeadLetter] = []
    letters.listeners.append(heard.append)
    letters.add(letter(9))
    letters.listeners.clear()
    letters.add(letter(1))
    assert heard == [letter(9)] and letters.total == 2


def test_odd_reasons() -> None:
    letters = DeadLetters(max_raw=10)
    for reason in ("", ": x", "no colon", "x" * 10_000, "half \ud800: a pair"):
        letters.add(letter(0, reason))
    assert letters.counts == {"other": 2, "no colon": 1, "x" * 64: 1, "half ?": 1}
    assert max(len(kept.reason) for kept in letters) == 10


def test_categories_are_bounded() -> None:
    letters = DeadLetters()
    for n in range(1000):
        letters.add(letter(0, f"reason {n}: x"))
    letters.add(letter(0, "reason 5: y"))
    assert len(letters.counts) == 101 and letters.counts["other"] == 900
    assert letters.counts["reason 5"] == 2 and letters.total == 1001


def test_its_state_is_all_of_it() -> None:
    letters = DeadLetters(capacity=3)
    assert isinstance(letters, Stateful)
    for n in range(5):
        letters.add(DeadLetter({"topic": "t", "at": [n, None, {"x": 1.5}]}, "bad id: x", bytes(range(n))))
    state = letters.state_dict()
    check_state_is_plain(state)
    saved = copy_state(state)
    twin = DeadLetters(capacity=3)
    twin.add(letter(1))
    twin.load_state_dict(saved)
    assert list(twin) == list(letters) and twin.counts == letters.counts and twin.total == 5
    for one in (letters, twin):
        one.add(letter(7))
    assert same_state(letters.state_dict(), twin.state_dict())
    assert same_state(state, saved) and not same_state(state, twin.state_dict())
    smaller = DeadLetters(capacity=1)
    smaller.load_state_dict(saved)
    assert list(smaller) == list(letters)[1:2] and smaller.total == 5


@pytest.mark.parametrize("arguments", [{"capacity": -1}, {"max_raw": -1}])
def test_what_cannot_work_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="got -1"):
        DeadLetters(**arguments)
