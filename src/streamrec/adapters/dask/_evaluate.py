"""Evaluate: a model's metrics over a data set, file by file, merged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from streamrec.adapters.dask._cluster import Task, require_client, results, spread
from streamrec.adapters.dask._models import Reference, model_of, reference
from streamrec.errors import ConfigError
from streamrec.evaluators import Report
from streamrec.evaluators.progressive import curves_of, intervals_of, values_of
from streamrec.protocols import Metric, Model
from streamrec.storage import EncodedRows, Store

__all__ = ["evaluate"]

WINDOW = 65_536


def evaluate(
    client: Any,
    model: Model | Store | str | os.PathLike[str],
    data: EncodedRows | str,
    *,
    metrics: Sequence[Metric],
    timeout: float = 3600.0,
) -> Report:
    """Judge a model, which learns nothing, by all rows of a data set, or of the files of it that `only` has chosen.

    `model`: a model, or a store whose newest version is judged, read by each worker once. `metrics`: what they say is
    what they would say after one pass, for parts merge into the whole; they are not changed. `timeout`: seconds in
    which some task must end. Raises `ConfigError` where there is no metric, `SchemaError` where the model was made for
    other rows, `ClusterError` where the cluster fails.
    """
    client = require_client(client)
    if not metrics:
        raise ConfigError("metrics must name one at least, such as [AUC()]")
    rows = EncodedRows(data) if isinstance(data, str) else data
    where = reference(client, model)
    spread(client, where.sent)
    fresh = [metric.fresh() for metric in metrics]
    tasks = [Task("evaluate", _judge, (where._replace(sent=None), where.sent, one, fresh)) for one in rows.by_file()]
    found: list[list[Metric]] = [[]] * len(tasks)
    for place, part in results(client, tasks, timeout=timeout):
        found[place] = part
    for part in found:  # in their order, so that the sums are the same every time
        for metric, one in zip(fresh, part, strict=True):
            metric.merge(one)
    counts = {"events": len(rows), "learned": 0}
    return Report(values_of(fresh), counts, intervals=intervals_of(fresh), curves=curves_of(fresh))


def _judge(where: Reference, sent: Any, rows: EncodedRows, metrics: Sequence[Metric]) -> list[Metric]:
    model = model_of(where, sent)
    model.schema.require(rows.schema, what="the rows")
    own = [metric.fresh() for metric in metrics]  # a worker may run two of these at a time
    while (part := rows.read(WINDOW)) is not None:
        scores = model.predict(part.batch)
        for metric in own:
            metric.update(part.labels, scores, part.weights, metric.kinds[0])
    return own
