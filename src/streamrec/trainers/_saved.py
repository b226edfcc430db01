"""Whether what was saved fits what is to go on with it: the model, the parts around it, what is to be learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from streamrec.errors import ConfigError
from streamrec.preprocessors import LabelJoin
from streamrec.protocols import Model, Stage, State
from streamrec.schema import Schema

__all__ = ["description", "describers", "plain", "require_parts", "require_same", "require_target"]


def require_target(join: LabelJoin | None, target: str) -> None:
    """Raise `ConfigError` where there is a join that gives no labels of this kind."""
    if join is not None and target not in join.windows:
        raise ConfigError(
            f"the model is to learn {target!r}, but the join has windows for {', '.join(join.windows)}; "
            f"give LabelJoin a window for {target!r}, or another target"
        )


def require_parts(state: State, preprocessors: Sequence[Stage], join: LabelJoin | None) -> None:
    """Raise `ConfigError` unless `state` was cut with preprocessors like these, and with a join where there is one."""
    stages = [saved["type"] for saved in state["preprocessors"]]
    if stages != [type(stage).__name__ for stage in preprocessors] or (state["join"] is None) != (join is None):
        raise ConfigError(
            f"the checkpoint was cut with the preprocessors [{', '.join(stages)}] and "
            f"{'no' if state['join'] is None else 'a'} join; build them as then, or use an empty store"
        )


def plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them: an undefined one is null."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def description(model: Model) -> dict[str, Any]:
    """What a version says of the model it is of, as JSON has it."""
    config = getattr(model, "config", None)
    return {
        "type": type(model).__name__,
        "schema": model.schema.to_dict(),
        "config": None if config is None else config(),
    }


def describers(preprocessors: Sequence[Stage]) -> list[Any]:
    """Those that add features, which a service must add as well."""
    return [stage for stage in preprocessors if hasattr(stage, "describe") and hasattr(stage, "published")]


def require_same(model: Model, saved: Mapping[str, Any], *, what: str) -> None:
    """Raise unless the model is of the type, schema and settings of the one described."""
    mine = description(model)
    if mine["type"] != saved["type"]:
        raise ConfigError(
            f"{what} is of a {saved['type']}, not of a {mine['type']}; use another store for another model"
        )
    model.schema.require(Schema.from_dict(saved["schema"]), what=what)
    if mine["config"] is not None and saved["config"] is not None:
        differ = [
            f"{name}={saved['config'].get(name)!r} there and {value!r} here"
            for name, value in mine["config"].items()
            if saved["config"].get(name) != value
        ]
        if differ:
            raise ConfigError(f"the model differs from that of {what}: {'; '.join(differ)}; use the settings it had")
