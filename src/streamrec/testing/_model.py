"""check_model: what every model promises."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamrec.batch import Batch
from streamrec.protocols import LEARN, SCORE, Model, OrderedModel
from streamrec.storage import resolve
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference

__all__ = ["check_model"]

_MAX_CUTS = 20
_REPEATS = 20
_FOLLOWED = ("changes", "mark", "live", "load_changes")
_COLUMNS = ("ids", "values", "fields", "starts", "ends", "text_refs", "times")


def check_model(make: Callable[[], Model], batch: Batch, labels: ArrayLike) -> None:
    """Check that a model learns event by event, however its rows are cut and wherever it is interrupted.

    `make` returns a new model, the same each time. `batch`, `labels`: some tens of rows encoded by its schema, with
    labels of both kinds, among them ids that occur again and again, so that there is something to learn and to get
    wrong.

    Checked: probabilities are float32 in [0, 1], one a row; predicting changes nothing, and does not depend on which
    rows are asked for together; the batch and the labels stay as they were; an empty batch and ids never seen are
    fine; two new models learn the same; learning all equals learning row by row and in parts cut at random, in state
    and probabilities, bit for bit; learning the same again brings the
    probabilities nearer to the labels; the state can be stored without pickle and does not follow later learning; a
    twin that loads it, new or used, goes on as if there had been no interruption (at every cut, or at 20 of them).

    Where it has them: `step` equals one call of `predict` or `learn` per operation, bit for bit, in any order;
    `published()` gives the same probabilities in a new model, which goes on learning from there;
    `from_config(config())` makes the same model; what was cut at a `mark`, and what `live()` gave then and was copied
    after more was learned, is with the `changes()` of later what `state_dict()` or `published()` gives later, in a
    store and by `load_changes` in place, whichever of the two marks moved meanwhile. Raises `AssertionError` saying
    what differs.

    >>> from streamrec import Id, Impression, Schema
    >>> from streamrec.models import FM
    >>> from streamrec.preprocessors import encode
    >>> schema = Schema(Id("user"), Id("item"))
    >>> shown = [Impression(id=str(n), time=0.0, user=str(n % 3), item=str(n % 4)) for n in range(12)]
    >>> check_model(lambda: FM(schema, dim=4), encode(schema, shown).batch, [n % 2 for n in range(12)])
    """
    wanted: NDArray[np.float32] = np.array(labels, dtype=np.float32)
    if len(batch) < 4 or wanted.shape != (len(batch),) or wanted.min() == wanted.max():
        raise AssertionError(
            f"got {len(batch)} rows and labels of shape {wanted.shape}, {len(np.unique(wanted))} of them distinct; "
            "give check_model four rows or more, a label for each, and labels of both kinds"
        )
    given = [getattr(batch, name).copy() for name in _COLUMNS]
    given_labels = wanted.copy()

    def unchanged() -> None:
        for name, before in zip(_COLUMNS, given, strict=True):
            _same(before, getattr(batch, name), f"the {name} of the batch, which no model may change")
        _same(given_labels, wanted, "the labels, which no model may change")

    rng = random.Random(0)

    whole = _new(make)
    pristine = _state(whole)
    _predict(whole, batch, "a new model")
    learned = _predict(_learned(whole, batch, wanted), batch, "a model that has learned")
    ends = _state(whole)
    unchanged()

    _check_reading(make, batch, wanted, learned)
    _check_cuts(make, batch, wanted, (ends, learned), rng)
    _check_nothing(make, batch, pristine)
    _check_learning(make, batch, wanted)
    _check_interruptions(make, batch, wanted, (ends, learned))
    if isinstance(whole, OrderedModel):
        _check_step(make, batch, wanted, rng)
    if hasattr(whole, "published"):
        _check_published(make, batch, wanted)
    if any(hasattr(whole, name) for name in _FOLLOWED):
        _check_changes(make, batch, wanted, rng)
    if hasattr(whole, "config"):
        _check_config(whole, batch, wanted, (ends, learned))
    unchanged()


def _new(make: Callable[[], Model]) -> Model:
    model: Any = make()
    if not isinstance(model, Model):
        needed = ("schema", "predict", "learn", "state_dict", "load_state_dict")
        missing = [name for name in needed if not hasattr(model, name)]
        raise AssertionError(f"a model needs {', '.join(needed)}; {type(model).__name__} has no {missing}")
    checked: Model = model
    return checked


def _state(model: Model) -> Any:
    return copy_state(model.state_dict())


def _predict(model: Model, batch: Batch, what: str) -> NDArray[np.float32]:
    """The probabilities, which must be well formed and must not have changed the model."""
    before = _state(model)
    scores: Any = model.predict(batch)
    if (difference := first_difference(before, _state(model))) is not None:
        raise AssertionError(f"{what}: predict changed the state: {difference}; reading never writes")
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or scores.shape != (len(batch),):
        found = f"{scores.dtype} {scores.shape}" if isinstance(scores, np.ndarray) else type(scores).__name__
        raise AssertionError(f"{what}: predict must return a numpy array, float32 ({len(batch)},), got {found}")
    if not ((scores >= 0) & (scores <= 1)).all():  # false for nan too
        raise AssertionError(f"{what}: probabilities are from 0 to 1, got {scores[~((scores >= 0) & (scores <= 1))]}")
    return scores.copy()


def _learned(model: Model, batch: Batch, labels: NDArray[np.float32]) -> Model:
    model.learn(batch, labels)
    return model


def _same(expected: Any, found: Any, what: str) -> None:
    if (difference := first_difference(expected, found, "it")) is not None:
        raise AssertionError(f"{what}: {difference}")


def _same_model(expected: tuple[Any, Any], model: Model, batch: Batch, what: str) -> None:
    _same(expected[0], _state(model), f"{what}: the state")
    _same(expected[1], _predict(model, batch, what), f"{what}: the probabilities")


def _check_reading(make: Callable[[], Model], batch: Batch, labels: NDArray[np.float32], learned: Any) -> None:
    model = _learned(_new(make), batch, labels)
    _same(learned, _predict(model, batch, "predicting"), "two new models that learned the same: the probabilities")
    single = np.concatenate([_predict(model, batch.take([row]), f"row {row} alone") for row in range(len(batch))])
    _same(learned, single, "predicting row by row: the probabilities")
    backwards = np.arange(len(batch))[::-1].copy()
    _same(learned[backwards], _predict(model, batch.take(backwards), "backwards"), "predicting the rows backwards")
    unseen = replace(batch, ids=~batch.ids)
    _predict(model, unseen, "ids that were never seen")
    _predict(_learned(model, unseen, labels), unseen, "ids that were never seen, now learned")


def _check_cuts(
    make: Callable[[], Model], batch: Batch, labels: NDArray[np.float32], expected: Any, rng: random.Random
) -> None:
    count = len(batch)
    ways = {"learning the same again in a new model": [], "learning row by row": [*range(1, count)]}
    for number in range(3):
        ways[f"learning in parts cut at random, {number}"] = sorted(
            rng.sample(range(1, count), rng.randint(1, min(count - 1, 20)))
        )
    for what, cuts in ways.items():
        model = _new(make)
        for start, end in zip([0, *cuts], [*cuts, count], strict=True):
            model.learn(batch.take(slice(start, end)), labels[start:end].copy())
        _same_model(expected, model, batch, what)
    model = _new(make)
    model.learn(batch, labels, np.ones(count, dtype=np.float32))
    _same_model(expected, model, batch, "learning with weights of 1 instead of none")


def _check_nothing(make: Callable[[], Model], batch: Batch, pristine: Any) -> None:
    model = _new(make)
    empty = batch.take([])
    none = np.zeros(0, dtype=np.float32)
    model.learn(empty, none, none)
    _same(pristine, _state(model), "learning an empty batch: the state")
    _predict(model, empty, "an empty batch")


def _check_learning(make: Callable[[], Model], batch: Batch, labels: NDArray[np.float32]) -> None:
    # one row, so that it is clear which way is nearer
    for row in (int(labels.argmin()), int(labels.argmax())):
        shown, label = batch.take([row]), labels[row : row + 1]
        model = _new(make)
        before = float(_predict(model, shown, "before learning")[0])
        for _ in range(_REPEATS):
            model.learn(shown, label)
        after = float(_predict(model, shown, "after learning")[0])
        if abs(after - label[0]) >= abs(before - label[0]):
            raise AssertionError(
                f"learning row {row} with the label {label[0]:g} {_REPEATS} times took its probability from "
                f"{before:.6g} to {after:.6g}, which is no nearer"
            )
    model = _new(make)
    before = _mean_loss(_predict(model, batch, "before learning"), labels)
    for _ in range(_REPEATS):
        model.learn(batch, labels)
    after = _mean_loss(_predict(model, batch, "after learning"), labels)
    if after >= before:
        raise AssertionError(
            f"learning the batch {_REPEATS} times took its log loss from {before:.6g} to {after:.6g}, which is no less"
        )


def _mean_loss(scores: NDArray[np.float32], labels: NDArray[np.float32]) -> float:
    p = np.clip(scores.astype(np.float64), 1e-9, 1 - 1e-9)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


def _check_interruptions(make: Callable[[], Model], batch: Batch, labels: NDArray[np.float32], expected: Any) -> None:
    count = len(batch)
    cuts = sorted({round(number * count / (_MAX_CUTS - 1)) for number in range(_MAX_CUTS)})
    walker = _new(make)
    used = _learned(_new(make), batch, 1 - labels)  # a state must replace what it remembers
    states: list[tuple[int, Any, Any]] = []
    last = 0
    for cut in cuts:
        what = f"interrupted after {cut} of {count} rows"
        walker.learn(batch.take(slice(last, cut)), labels[last:cut].copy())
        last = cut
        live = walker.state_dict()
        check_state_is_plain(live)
        saved = copy_state(live)
        states.append((cut, live, saved))
        scores = _predict(walker, batch, what)
        for twin, name in ((_new(make), "a new model"), (used, "a used model")):
            stored = copy_state(saved)
            twin.load_state_dict(stored)
            _same_model((saved, scores), twin, batch, f"{name} that loaded a state, {what}")
            twin.learn(batch.take(slice(cut, count)), labels[cut:].copy())
            _same_model(expected, twin, batch, f"{name} that went on from a state, {what}")
            _same(saved, stored, f"a model that loaded a state changed it, {what}; copy what is loaded")
    for cut, live, saved in states:
        _same(saved, live, f"the state cut after {cut} rows changed later; copy what is cut")


def _check_step(make: Callable[[], Model], batch: Batch, labels: NDArray[np.float32], rng: random.Random) -> None:
    for number in range(4):
        what = f"step with operations in random order, {number}"
        rows = np.array([rng.randrange(len(batch)) for _ in range(2 * len(batch))], dtype=np.int64)
        ops = np.array([rng.choice((SCORE, LEARN, SCORE | LEARN)) for _ in rows], dtype=np.int8)
        weights = np.array([rng.choice((1.0, 1.0, 0.5, 3.0)) for _ in rows], dtype=np.float32)
        single = _new(make)
        expected = np.zeros(len(rows), dtype=np.float32)
        for k, row in enumerate(rows):
            shown = batch.take([row])
            if ops[k] & SCORE:
                expected[k] = single.predict(shown)[0]
            if ops[k] & LEARN:
                single.learn(shown, labels[row : row + 1], weights[k : k + 1])
        ends = (_state(single), _predict(single, batch, what))
        scored = (ops & SCORE) != 0
        for cuts in ([], sorted(rng.sample(range(1, len(rows)), min(5, len(rows) - 1)))):
            model: Any = _new(make)
            found = []
            for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True):
                part = slice(start, end)
                found.append(model.step(batch, rows[part], ops[part], labels[rows[part]], weights[part]))
            scores = np.concatenate(found)
            if scores.dtype != np.float32 or scores.shape != (len(rows),):
                raise AssertionError(
                    f"{what}: step must return float32 ({len(rows)},), got {scores.dtype} {scores.shape}"
                )
            _same(expected[scored], scores[scored], f"{what}: the scores")
            _same_model(ends, model, batch, what)
    model = _new(make)
    before = _state(model)
    rows = np.arange(len(batch), dtype=np.int64)
    nothing = np.zeros(len(batch), dtype=np.float32)
    model.step(batch, rows, np.full(len(batch), SCORE, dtype=np.int8), nothing, nothing)
    _same(before, _state(model), "step that only scores: the state")


def _check_published(make: Callable[[], Model], batch: Batch, labels: NDArray[np.float32]) -> None:
    model: Any = _new(make)
    for _ in range(3):
        model.learn(batch, labels)
    what = "a new model that loaded what was published"
    published = model.published()
    check_state_is_plain(published)
    saved = copy_state(published)
    scores = _predict(model, batch, "publishing")
    scorer = _new(make)
    scorer.load_state_dict(copy_state(saved))
    _same(scores, _predict(scorer, batch, what), f"{what}: the probabilities")

    # What it has learned must not fall back to where a new model starts: it moves by steps, not by a jump.
    fresh = _predict(_new(make), batch, "a new model")
    scorer.learn(batch.take([0]), labels[:1])
    model.learn(batch.take([0]), labels[:1])
    _same(saved, published, "what was published changed later; copy what is cut")
    moved = _predict(scorer, batch, f"{what}, and learned a row more")
    away, back = float(np.abs(moved - scores).mean()), float(np.abs(fresh - scores).mean())
    if away > 0.5 * back:
        raise AssertionError(
            f"{what} and learned one row more: its probabilities moved by {away:.4g} on average, when {back:.4g} is "
            "all that was ever learned; go on from the published weights, do not begin anew"
        )


def _check_changes(make: Callable[[], Model], batch: Batch, labels: NDArray[np.float32], rng: random.Random) -> None:
    missing = [name for name in _FOLLOWED if not hasattr(_new(make), name)]
    if missing:
        raise AssertionError(f"a model that is saved by changes needs {', '.join(_FOLLOWED)}; this has no {missing}")
    count = len(batch)
    for published in (False, True):
        name = "published()" if published else "state_dict()"
        model: Any = _new(make)

        def state(model: Any = model, published: bool = published) -> Any:
            return copy_state(getattr(model, "published", model.state_dict)() if published else model.state_dict())

        cuts = sorted(rng.sample(range(1, count), min(5, count - 1)))
        model.learn(batch.take(slice(0, cuts[0])), labels[: cuts[0]].copy())
        model.mark(published)
        live = model.live(published)
        before, held = state(), _new(make)
        held.load_state_dict(copy_state(before))
        kept: list[tuple[Any, Any]] = []
        for start, end in zip(cuts, [*cuts[1:], count], strict=True):
            what = f"{name}, changes between {start} and {end} of {count} rows"
            rows = slice(start, end)
            model.learn(batch.take(rows), labels[rows].copy())
            begun = None if live is None else copy_state(live)  # as a thread copies it, while more is learned
            model.learn(batch.take(rows), labels[rows].copy())
            model.mark(not published)  # of no matter to this one
            now, changes = state(), model.changes(published)
            model.mark(published)
            check_state_is_plain(changes)
            stored = copy_state(changes)
            kept.append((changes, stored))
            _same(now, resolve([copy_state(before), copy_state(stored)]), f"{what}, in a store: the state")
            if begun is not None:
                _same(now, resolve([begun, copy_state(stored)]), f"{what}, over a copy of live() made meanwhile")
            scores = _predict(model, batch, what)
            loaded: Any = held
            loaded.load_changes(copy_state(stored))
            whole = _new(make)
            whole.load_state_dict(copy_state(now))
            _same_model((_state(whole), scores), held, batch, f"{what}, loaded in place")
            live, before = None, now
        for changes, stored in kept:
            _same(stored, changes, f"{name}, changes that were cut changed later; copy what is cut")
        nothing = model.changes(published)
        _same(before, resolve([copy_state(before), copy_state(nothing)]), f"{name}, changes where nothing was learned")


def _check_config(model: Any, batch: Batch, labels: NDArray[np.float32], expected: Any) -> None:
    config = model.config()
    if not isinstance(config, Mapping):
        raise AssertionError(f"config() must return a mapping, got a {type(config).__name__}")
    _check_json(config, "config")
    twin = type(model).from_config(config)
    _same(config, twin.config(), "the config of a model made by from_config")
    if twin.schema != model.schema:
        raise AssertionError(f"from_config(config()) has the schema {twin.schema!r}, not {model.schema!r}")
    twin.learn(batch, labels)
    _same_model(expected, twin, batch, "a model made by from_config(config())")


def _check_json(value: Any, where: str) -> None:
    """Fail unless JSON can hold this."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if type(key) is not str:
                raise AssertionError(f"{where} has the key {key!r}; in JSON the keys are strings")
            _check_json(inner, f"{where}[{key!r}]")
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for index, inner in enumerate(value):
            _check_json(inner, f"{where}[{index}]")
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise AssertionError(f"{where} is a {type(value).__name__}, which JSON cannot hold")
