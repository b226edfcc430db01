"""BertFM: an FM that reads texts, by vectors that a frozen encoder makes of them once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamrec._pointers import pointers_to
from streamrec.batch import Batch
from streamrec.errors import ConfigError, SchemaError
from streamrec.models import _kernels, _text_kernels
from streamrec.models.fm import CHECKPOINT, FM, PUBLISHED, _arguments
from streamrec.models.optimizers import Adagrad, Optimizer, optimizer_from_dict
from streamrec.models.text_cache import TextCache
from streamrec.models.text_encoder import TextEncoder
from streamrec.models.text_learner import Example, TextLearner
from streamrec.protocols import LEARN, SCORE, WEIGH, Changed, State
from streamrec.schema import Id, Schema, Text

__all__ = ["BertFM", "Taste", "Vectors"]

AT_ONCE = 8192  # rows of which the texts are looked up in one call
_ALONE = np.zeros(1, dtype=np.int64)


class Vectors(Protocol):
    """What `BertFM` reads texts by: a `TextCache`, or anything that gives a text the same vector each time.

    `hidden`: how many numbers. Its `version`, or that of its `encoder`, says which vectors they are.
    """

    @property
    def hidden(self) -> int: ...

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 `(n, hidden)`; all zeros for a text that says nothing."""
        ...


class Taste(msgspec.Struct, frozen=True):
    """What each user clicked, as a mean of its embeddings, and how near to it the text of a row is.

    `by`: the `Id` field that has tastes. `of`: the `Text` field they are of; "": the first. `span`: the last clicks
    that count, by and large: the first `span` weigh the same, after that each new one weighs 1/span. `capacity`: users
    remembered, a power of two from 8; past it, of those whose tastes lie together, the one not clicking for longest
    goes. A taste takes 4 bytes a number of an embedding: 1.5 KB of 384.
    """

    by: str = "user"
    of: str = ""
    span: float = 100.0
    capacity: int = 1 << 15

    def __post_init__(self) -> None:
        if not 1 <= self.span <= 1e6:
            raise ConfigError(f"Taste: span must be from 1 to 1e6 clicks, got {self.span!r}")
        if isinstance(self.capacity, bool) or self.capacity < _text_kernels.WAYS or self.capacity & (self.capacity - 1):
            raise ConfigError(f"Taste: capacity must be a power of two from 8, got {self.capacity!r}")


class BertFM(FM):
    """An FM in which each `Text` field of the schema is a field like the others: its vector is a learned projection of
    the text's embedding, P e, and it has a linear weight w·e.

    So users, contexts and ids interact with what an item says, and an item never seen before is scored by that.
    Projections and ids learn from every event, in the loop of the FM; the encoder is frozen, or learns at its own rate.
    A text that is missing or says nothing contributes nothing. Embeddings are brought to length 1, less the mean of all
    that was learned from, which is the model's state.

    `texts`: a `TextCache`, or any `Vectors`; a `TextLearner` where the encoder is to learn, too. `taste`: what users
    clicked is a text field too, and how similar the row's text is to it counts by a weight of its own; None: not. A
    click that no impression was shown for is told by a row of label 1 and weight 0, which moves tastes and means alone.
    `text_optimizer`: of projections, an `Adagrad` that
    remembers one number a factor (so `l2` must be 0, and `row_wise` makes no difference). Everything else as in `FM`.

    A checkpoint or published version holds no vectors, but which encoder they came from: `config()` refers to it by its
    path or name. One that has another version is refused.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        texts: Vectors,
        taste: Taste | None = Taste(),  # noqa: B008 - frozen
        text_optimizer: Adagrad | None = None,
        dim: int = 16,
        optimizer: Optimizer | None = None,
        linear_optimizer: Optimizer | None = None,
        init: float = 0.03,
        seed: int = 0,
    ) -> None:
        super().__init__(schema, dim=dim, optimizer=optimizer, linear_optimizer=linear_optimizer, init=init, seed=seed)
        names = [field.name for field in schema if isinstance(field, Text)]
        if not names:
            raise SchemaError('BertFM reads texts: give the schema a field such as Text("title"), or use FM')
        self.text_optimizer = text_optimizer or Adagrad(lr=0.05, eps=0.1)
        if not isinstance(self.text_optimizer, Adagrad) or self.text_optimizer.l2:
            raise ConfigError(f"text_optimizer must be an Adagrad with l2=0, got {text_optimizer!r}")
        tasted = by = -1
        if taste is not None:
            tasted, by = _fields_of(taste, schema, names)
        self.texts, self.taste = texts, taste
        hidden = int(texts.hidden)
        self._shape = shape = _text_kernels.Shape(hidden, len(names), tasted, by)
        inputs = shape.inputs
        rng = np.random.default_rng([seed, inputs])
        start = rng.uniform(-1, 1, (inputs, dim, hidden)) * init * 3**0.5
        self.projections = nn.Parameter(torch.from_numpy(start.astype(np.float32)))
        self.text_weights = nn.Parameter(torch.zeros(inputs, hidden))
        self.similarity = nn.Parameter(torch.zeros(1))
        # of each input's factors and linear weight, and last of the similarity
        self._text_memory = np.zeros(inputs * (dim + 1) + 1, dtype=np.float32)
        self._means = np.zeros((len(names), hidden), dtype=np.float32)
        self._seen = np.zeros(len(names), dtype=np.int64)
        rows = 0 if taste is None else taste.capacity
        self._keys, self._stamps = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
        self._clicks, self._header = np.zeros(rows, dtype=np.float32), np.zeros(2, dtype=np.int64)
        self._tastes = np.zeros((rows, hidden), dtype=np.float32)
        self._tasted = np.zeros(rows, dtype=np.uint8)  # which mark they are not in: as `_touched` of the FM
        self._text_numbers = np.zeros(3, dtype=np.float32)
        self._text_pointers = np.zeros(0, dtype=np.int64)
        self._untold = True  # no example was made yet
        self._write_rates()
        kinds = (self.optimizer.kind, self.linear_optimizer.kind)
        self._kernels = _kernels.kernels_of(dim, *kinds, bool(len(self._admit)), self._expires, shape)

    def _write_rates(self) -> None:
        super()._write_rates()
        span = 1.0 if self.taste is None else self.taste.span
        self._text_numbers[:] = [self._rate * self.text_optimizer.lr, self.text_optimizer.eps, span]

    @property
    def encoder_version(self) -> str:
        """Which vectors it reads."""
        return str(getattr(self.texts, "version", None) or self.texts.encoder.version)  # type: ignore[attr-defined]

    # -- scoring and learning ------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """As `FM.predict`."""
        if len(batch) <= AT_ONCE:
            return super().predict(batch)
        return np.concatenate([FM.predict(self, batch.take(part)) for part in _parts(len(batch))])

    def step(
        self,
        batch: Batch,
        rows: NDArray[np.int64],
        ops: NDArray[np.int8],
        labels: NDArray[np.float32],
        weights: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """As `FM.step`. Where the encoder learns too, it is told of a row before the row is learned."""
        learner = self.texts
        if not isinstance(learner, TextLearner):
            return self._steps(batch, rows, ops, labels, weights)
        done, begin = [], 0
        if self._untold and len(rows) and 0 <= rows[0] < len(batch):
            self._untold = False
            self._examples(batch.take(rows[:1]), 0, 0.0, 1.0)  # compiled now, with the rest, and not amid the stream
        learns = ((ops & LEARN) != 0) & (weights > 0)
        for place in learner.due(learns).tolist():
            if learner.has_room():
                done.append(self._steps(*_cut(slice(begin, place), batch, rows, ops, labels, weights)))
                shown = batch.take(rows[place : place + 1]) if 0 <= rows[place] < len(batch) else None
                examples = self._examples(shown, int(ops[place]), float(labels[place]), float(weights[place]))
                done.append(self._steps(*_cut(slice(place, place + 1), batch, rows, ops, labels, weights)))
                learner.learn(examples)
                learner.turn()
                begin = place + 1
        done.append(self._steps(*_cut(slice(begin, len(rows)), batch, rows, ops, labels, weights)))
        return np.concatenate(done)

    def _steps(self, batch: Batch, *ordered: Any) -> NDArray[np.float32]:
        count = len(ordered[0])
        if count <= AT_ONCE:
            return super().step(batch, *ordered)
        return np.concatenate([FM.step(self, *_cut(part, batch, *ordered)) for part in _parts(count)])

    def _examples(self, one: Batch | None, op: int, label: float, weight: float) -> list[Example]:
        """Of one row, each of its texts with the gradient of the row's loss by the text's vector."""
        if one is None or not math.isfinite(label) or not math.isfinite(weight):
            return []  # the loop says what is wrong, or leaves it out
        p = float(self.predict(one)[0])
        if op & WEIGH:
            weight *= (label + (1 - label) * (1 - p)) * (1 + p)
        part, shape = self.parts(one)[0], self._shape
        refs, vectors = self._looked_up(self._refs(one), one.texts)
        found = []
        for t, ref in enumerate(refs[0].tolist()):
            known, there = _raised(vectors[ref : ref + 1] if ref >= 0 else vectors[:0])
            x, there = _raised(known - self._means[t], there)
            if not there.any():
                continue
            projection = self.projections[t].detach().numpy()  # (dim, hidden)
            by = (part[: self.dim] - projection @ x[0]) @ projection + self.text_weights[t].detach().numpy()
            if t == shape.tasted and shape.by in one.fields:  # else there is the text in the place of a taste
                by = by + part[self.dim : -1]
            found.append(Example(one.texts[one.text_refs[0, t]], (weight * (p - label) * by), self._means[t].copy()))
        return found

    def one(self, batch: Batch, label: float | None = None, weight: float = 1.0) -> float:
        """As `FM.one`; no faster than `step` with one operation."""
        if len(batch) != 1:
            raise ConfigError(f"one() takes a batch of one row, got {len(batch)} rows")
        op = np.array([SCORE if label is None else SCORE | LEARN], dtype=np.int8)
        floats = np.array([[label or 0.0], [weight]], dtype=np.float32)
        return float(self.step(batch, _ALONE, op, *floats)[0])

    def parts(self, batch: Batch) -> NDArray[np.float32]:
        """As `FM.parts`, `(rows, dim + 1)`; with tastes `(rows, dim + hidden + 1)`: then the numbers after the first
        `dim` are the user's taste times the weight of the similarity, or where the part has no user, the text."""
        if len(batch) <= AT_ONCE:
            return super().parts(batch)
        return np.concatenate([FM.parts(self, batch.take(part)) for part in _parts(len(batch))])

    def _map(self) -> NDArray[np.int64]:
        if self._pointers is None:
            found = super()._map()
            hidden = self._shape.hidden
            parameters = [p.detach().numpy() for p in (self.projections, self.text_weights.view(-1), self.similarity)]
            none = np.zeros((0, hidden), dtype=np.float32)
            self._text_pointers = pointers_to(
                (
                    *(none, none, parameters[0].reshape(-1, hidden), parameters[1], self._text_memory, self._means),
                    *(self._seen, self._text_numbers, parameters[2]),
                    *(self._keys, self._stamps, self._clicks, self._tastes, self._tasted, self._header),
                )
            )
            return found
        return super()._map()

    def _refs(self, batch: Batch) -> NDArray[np.int32]:
        """int32 `(rows, texts)`."""
        if not batch.text_refs.size:
            return np.full((len(batch), self._shape.texts), -1, dtype=np.int32)
        if batch.text_refs.shape != (len(batch), self._shape.texts):
            raise ConfigError(
                f"this schema has {self._shape.texts} texts, but text_refs of {len(batch)} rows are "
                f"{batch.text_refs.shape}: encode the batch by the model's schema"
            )
        return batch.text_refs

    def _read_texts(self, batch: Batch, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
        self._map()
        inside = not len(rows) or (rows.min() >= 0 and rows.max() < len(batch))
        refs = self._refs(batch)
        refs = refs[rows] if inside else refs[:0]  # the loop says what is wrong
        refs, vectors = self._looked_up(refs, batch.texts)
        texts = self._text_pointers.copy()
        for at, array in ((_text_kernels.REFS, refs), (_text_kernels.VECTORS, vectors)):
            texts[2 * at : 2 * at + 2] = array.__array_interface__["data"][0], len(array)
        return texts, (refs, vectors)

    def _looked_up(
        self, refs: NDArray[np.int32], texts: Sequence[str]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """References into the vectors of those texts alone that are referred to, and these vectors."""
        used, places = np.unique(refs, return_inverse=True)
        absent = int(len(used) > 0 and used[0] < 0)
        wanted = [texts[ref] for ref in used[absent:].tolist()]
        hidden = self._shape.hidden
        vectors = self.texts.vectors(wanted) if wanted else np.zeros((0, hidden), dtype=np.float32)
        if vectors.shape != (len(wanted), hidden):
            raise ConfigError(f"{len(wanted)} texts have vectors of {hidden} numbers each, got {vectors.shape}")
        found = np.ascontiguousarray((places.reshape(refs.shape) - absent).astype(np.int32))
        return found, np.ascontiguousarray(vectors, dtype=np.float32)

    # -- for autograd --------------------------------------------------------------------------------------------------

    def _text_parts(self, batch: Batch) -> Sequence[Tensor]:
        refs, vectors = self._looked_up(self._refs(batch), batch.texts)
        shape, found, xs = self._shape, [], []
        device = self.weights.device
        for t in range(shape.inputs):
            if t < shape.texts:
                known = np.concatenate([vectors, np.zeros((1, shape.hidden), dtype=np.float32)])[refs[:, t]]
                known, there = _raised(known)
                x, there = _raised(known - self._means[t], there)
            else:
                x, there = _raised(*self._tastes_of(batch))
            of = torch.from_numpy(x * there[:, None]).to(device)  # (rows, hidden)
            xs.append(of)
            linear = of @ self.text_weights[t]
            found.append(torch.cat([of @ self.projections[t].T, linear[:, None]], dim=1))
        if self.taste is not None:
            near = (xs[-1] * xs[shape.tasted]).sum(dim=1) * self.similarity
            found.append(torch.cat([near.new_zeros(len(batch), self.dim), near[:, None]], dim=1))
        return found

    def _tastes_of(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """float32 `(rows, hidden)`: each user's taste less the mean; and whether there is one."""
        places = np.full(len(batch), -1, dtype=np.int64)
        of_place = {int(key): place for place, key in enumerate(self._keys) if self._stamps[place]}
        for row, (start, end) in enumerate(zip(batch.starts.tolist(), batch.ends.tolist(), strict=True)):
            for entry in range(start, end):
                if batch.fields[entry] == self._shape.by:
                    places[row] = of_place.get(int(batch.ids[entry]), -1)
        return self._tastes[places] - self._means[self._shape.tasted], places >= 0

    # -- saving --------------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """As `FM.config`, with what the encoder was made of and its version."""
        encoder = getattr(self.texts, "encoder", self.texts)
        more = {"learner": self.texts.config()} if isinstance(self.texts, TextLearner) else {}
        return {
            **super().config(),
            "taste": None if self.taste is None else msgspec.to_builtins(self.taste),
            "text_optimizer": msgspec.to_builtins(self.text_optimizer),
            "encoder": encoder.config() if hasattr(encoder, "config") else None,
            "encoder_version": str(getattr(encoder, "version", "")),  # that it began with
            **more,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, texts: Vectors | None = None) -> BertFM:
        """The model that `config` describes. `texts`: None: a `TextCache` over the encoder that it refers to, which a
        process loads once. Raises `ConfigError` where that cannot be had, or is another version than `config` says."""
        if texts is None:
            if config["encoder"] is None:
                raise ConfigError("this BertFM was made with vectors that have no config(): pass texts=")
            texts = _cache_of(msgspec.json.encode(config["encoder"]))
            if "learner" in config:
                texts = TextLearner.from_config(config["learner"], texts)
        taste = config["taste"]
        arguments = _arguments(config)
        rule = optimizer_from_dict(config["text_optimizer"])
        model = cls(
            **arguments,
            texts=texts,
            taste=None if taste is None else msgspec.convert(taste, Taste),
            text_optimizer=rule,  # type: ignore[arg-type]
        )
        model._require_version(config["encoder_version"], config["encoder"])
        return model

    def _require_version(self, version: str, encoder: Any = None) -> None:
        if version != self.encoder_version:
            where = "" if encoder is None else f" ({encoder.get('model')})"
            raise ConfigError(
                f"the model was learned with version {version} of the encoder, but the one here{where} is "
                f"{self.encoder_version}: give it the encoder it was learned with"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> BertFM:
        texts = self.texts.twin() if isinstance(self.texts, TextLearner) else self.texts
        twin = type(self).from_config(self.config(), texts=texts)
        twin.load_state_dict(self.state_dict())
        return twin.train(self.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        twin = type(self).from_config(state["config"])
        self.__dict__.update(twin.__dict__)
        self.load_state_dict(state["state"])
        self.train(state["training"])

    def mark(self, published: bool = False) -> None:
        super().mark(published)
        self._tasted &= ~np.uint8(PUBLISHED if published else CHECKPOINT)

    def _state(self, *, published: bool, changes: bool = False, live: bool = False) -> dict[str, Any]:
        state = super()._state(published=published, changes=changes, live=live)
        for name in ("projections", "text_weights", "similarity"):
            state[name] = getattr(self, name).detach().clone()
        state |= {"means": self._means.copy(), "seen": self._seen.copy(), "encoder": self.encoder_version}
        if not published:
            state["text_memory"] = self._text_memory.copy()
        if isinstance(self.texts, TextLearner):
            state["adapters"] = self.texts.adapters
            if not published:
                state["learner"] = self.texts.state_dict()
        rows = np.flatnonzero(self._tasted & (PUBLISHED if published else CHECKPOINT)) if changes else _ALONE
        for name, array in self._taste_arrays().items():
            if changes:
                state[name] = Changed(rows, array[rows], len(array))
            else:
                state[name] = array if live else array.copy()
        state["taste_header"] = self._header.copy()
        return state

    def _taste_arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "taste_keys": self._keys,
            "taste_stamps": self._stamps,
            "taste_clicks": self._clicks,
            "tastes": self._tastes,
        }

    def load_changes(self, changes: State) -> None:
        """As `FM.load_changes`. Raises `ConfigError` where they are by another encoder."""
        self._load_adapters(changes, "")
        self._require_version(changes["encoder"])
        super().load_changes(changes)
        for name, array in self._taste_arrays().items():
            changes[name].put(array, len(array))
        self._tasted[changes["tastes"].rows] = CHECKPOINT | PUBLISHED
        self._load_texts(changes, "")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *more: Any) -> None:
        if prefix + "encoder" not in state_dict:
            raise SchemaError("the saved model is no BertFM: it has no encoder; use the model it was saved from")
        self._load_adapters(state_dict, prefix)
        self._require_version(state_dict[prefix + "encoder"])
        super()._load_from_state_dict(state_dict, prefix, *more)
        for name, array in self._taste_arrays().items():
            saved = np.asarray(state_dict[prefix + name])
            if saved.shape != array.shape:
                raise ConfigError(
                    f"the saved {name} are {saved.shape}, but this model's are {array.shape}: use the taste it was "
                    "saved with"
                )
            array[:] = saved
        self._tasted[:] = CHECKPOINT | PUBLISHED
        self._load_texts(state_dict, prefix)

    def _load_adapters(self, state: Mapping[str, Any], prefix: str) -> None:
        if isinstance(self.texts, TextLearner):
            # a model whose encoder was frozen goes on from that
            adapters = state.get(prefix + "adapters", torch.zeros(0))
            self.texts.load(adapters, state.get(prefix + "learner"))

    def _load_texts(self, state: Mapping[str, Any], prefix: str) -> None:
        with torch.no_grad():
            for name in ("projections", "text_weights", "similarity"):
                getattr(self, name).copy_(state[prefix + name])
        self._means[:], self._seen[:] = state[prefix + "means"], state[prefix + "seen"]
        self._text_memory[:] = state.get(prefix + "text_memory", 0.0)
        self._header[:] = state[prefix + "taste_header"]
        self._pointers = None


def _fields_of(taste: Taste, schema: Schema, texts: list[str]) -> tuple[int, int]:
    """Which of the texts tastes are of, and by which field."""
    of = taste.of or texts[0]
    if of not in texts:
        raise SchemaError(f"Taste: of must be a Text of the schema ({', '.join(texts)}), got {of!r}")
    places = {field.name: place for place, field in enumerate(schema) if isinstance(field, Id)}
    if taste.by not in places:
        known = ", ".join(places) or "it has none"
        raise SchemaError(
            f"Taste: by must be an Id of the schema ({known}), got {taste.by!r}; taste=None has no tastes"
        )
    return texts.index(of), places[taste.by]


@lru_cache(maxsize=4)
def _cache_of(config: bytes) -> TextCache:
    """The vectors by the encoder of a config; the same object for the same config."""
    return TextCache(TextEncoder.from_config(msgspec.json.decode(config)))


def _cut(part: slice, batch: Batch, *ordered: Any) -> tuple[Any, ...]:
    return (batch, *(one[part] for one in ordered))


def _parts(count: int) -> list[slice]:
    return [slice(begin, begin + AT_ONCE) for begin in range(0, count, AT_ONCE)]


def _raised(
    vectors: NDArray[np.float32], there: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The vectors at length 1, and which of them have one; as the loops have it, but for rounding."""
    sizes = (vectors * vectors).sum(axis=1)
    long = np.isfinite(sizes) & (sizes >= _text_kernels.SHORTEST)
    by = np.where(long, 1 / np.sqrt(np.where(long, sizes, 1)), 0)
    return (vectors * by[:, None]).astype(np.float32), long if there is None else long & there
