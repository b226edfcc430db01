"""Forget a user: what of them is in a model, in what waits, and in what is remembered."""

from __future__ import annotations

from typing import Any

from streamrec.errors import ConfigError
from streamrec.hashing import id_of
from streamrec.preprocessors import DeadLetters, Encoder, LabelJoin
from streamrec.protocols import Stage
from streamrec.storage import Archive
from streamrec.trainers.held_rows import HeldRows

__all__ = ["forget_rows", "names_of", "purge_letters"]


def names_of(user: str, preprocessors: list[Stage]) -> list[str]:
    """By what this user is known behind the preprocessors: by pseudonyms, where they make them, and the name itself."""
    pseudonyms = [name for stage in preprocessors for name in getattr(stage, "pseudonyms", lambda _: [])(user)]
    return [*pseudonyms, user]


def forget_rows(
    name: str, model: Any, encoder: Encoder, rows: HeldRows, join: LabelJoin | None, archive: Archive | None
) -> int:
    """Take this user's rows out of the model and out of what waits for a label; return how many there were.

    Raises `ConfigError` where the model knows users and cannot forget one.
    """
    if "user" not in encoder.schema.names:
        return 0  # then what waits does not say whose it is
    if not hasattr(model, "forget"):
        raise ConfigError(f"a {type(model).__name__} cannot forget: give it forget(field, value), or train a new one")
    removed = int(model.forget("user", name))
    slots = rows.of(encoder.schema.names.index("user"), id_of("user", name, encoder.schema.seed))
    if len(slots):
        if join is not None:
            join.forget(slots)
        if archive is not None:
            archive.release(slots)
        rows.free(slots)
    return removed + len(slots)


def purge_letters(name: str, letters: DeadLetters) -> int:
    """Take out of these dead letters those that name the user."""
    state: Any = letters.state_dict()
    raw = name.encode("utf-8", "surrogatepass")
    rows = zip(state["positions"], state["reasons"], state["raws"], strict=True)
    kept = [one for one in rows if not (name in one[0] or name in one[1] or raw in one[2])]
    removed = len(state["raws"]) - len(kept)
    if removed:
        columns: Any = zip(*kept, strict=True) if kept else ([], [], [])
        positions, reasons, raws = map(list, columns)
        letters.load_state_dict({**state, "positions": positions, "reasons": reasons, "raws": raws})
    return removed
