"""Models for the workers: published versions and models in memory, loaded by each worker once."""

from __future__ import annotations

import os
import secrets
from typing import Any, NamedTuple

from distributed import Client

from streamrec.adapters.dask._cluster import given, once
from streamrec.errors import StoreError
from streamrec.models import FM
from streamrec.protocols import Model, State
from streamrec.serving import Scorer
from streamrec.serving._loader import MODELS
from streamrec.serving.view import View
from streamrec.storage import Store

__all__ = ["Reference", "catalogue_of", "model_of", "reference"]


class Reference(NamedTuple):
    """A version in a store that workers can read, or a model that was sent to them."""

    key: str
    uri: str
    number: int
    sent: Any = None


def reference(client: Client, model: Model | Store | str | os.PathLike[str]) -> Reference:
    """What workers need to have this model. Raises `StoreError` where nothing is published."""
    key = f"model-{secrets.token_hex(8)}"
    if not isinstance(model, (Store, str, os.PathLike)):
        return Reference(key, "", 0, given(client, model))
    store = model if isinstance(model, Store) else Store(model)
    newest = store.versions.latest()
    if newest is None:
        raise StoreError(f"nothing is published in {store.uri}: run a trainer on it first, or call its publish()")
    return Reference(key, store.uri, newest.number)


def _read(where: Reference) -> tuple[dict[str, Any], State]:
    """The description and the state of a version."""
    found = Store(where.uri).versions.read(where.number)
    if found is None:
        raise StoreError(f"version {where.number} has gone from {where.uri}; give its store a larger keep")
    version, state = found
    return version.info["model"], state["model"]


def model_of(where: Reference, sent: Model | None) -> Model:
    """The model, read-only: tasks on the same worker share it."""
    if sent is not None:
        return sent

    def make() -> Model:
        described, state = _read(where)
        model = MODELS[described["type"]](described["config"])
        model.load_state_dict(state)
        return model

    return once(where.key, make)


def catalogue_of(where: Reference, sent: Any, catalogue: Any) -> tuple[View, Any]:
    """This very version, whatever is published meanwhile, over the catalogue; and its names as a column of Arrow's."""

    def make() -> tuple[View, Any]:
        import pyarrow

        if sent is None:
            described, state = _read(where)
        else:
            if not isinstance(sent, FM):
                raise StoreError("score takes an FM or a store where one is published")
            described = {"type": type(sent).__name__, "schema": sent.schema.to_dict(), "config": sent.config()}
            state = sent.published()
        private = Store(f"memory://{where.key}")
        private.versions.write({"model": state}, {"model": described})
        scorer = Scorer(private)
        scorer.set_catalogue(catalogue)
        view = scorer.view()
        return view, pyarrow.array(view.catalogue, pyarrow.string())

    return once("catalogue-" + where.key, make)
