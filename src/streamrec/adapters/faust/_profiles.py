"""profiles: what each user has been shown and has clicked, in a Faust table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from streamrec.adapters.faust._gate import Gate
from streamrec.adapters.faust._outbox import Outbox
from streamrec.adapters.faust._topics import raw_topic
from streamrec.errors import ConfigError
from streamrec.events import DeadLetter, Event, Impression, Labeled, decode_event
from streamrec.preprocessors import Validate
from streamrec.sources.kafka import decode_message

__all__ = ["profiles"]


def profiles(
    app: Any,
    topic: Any,
    *,
    name: str = "profiles",
    half_life: float = 86_400.0,
    partitions: int | None = None,
    decode: Callable[[bytes], Event] = decode_event,
    dead_letters: str | None = None,
    timeout: float = 30.0,
) -> Any:
    """Keep a profile of each user in a Faust `Table`, from a topic of impressions or labelled examples; returns it.

    The topic must be keyed by user, so that one worker sees all of a user. `table[user]` is a mapping:
    `impressions` and `clicks`, counts since the start (`clicks` from `Labeled` items of kind "click" alone); `shown`
    and `clicked`, the same with each event counting half as much every `half_life` seconds of event time, so
    that `clicked / shown` is a recent rate; `time`, of the newest event. Faust writes each change to the table's
    changelog topic and reads it back when a worker starts. Counts are at least once: Faust may hand an event over
    again after a crash. `partitions`: those of the topic, if not the app's default. `dead_letters`: a topic for what
    cannot be read or is refused, as in `train`; other feedback is passed over, and counted. `timeout`: seconds without
    an answer from a broker after which the app's start fails with a `SourceError`.

    Raises `ConfigError` where `half_life` is not above 0 seconds.
    """
    if not 0 < half_life < float("inf"):
        raise ConfigError(f"half_life must be > 0 seconds and finite, got {half_life!r}")
    table = app.Table(name, default=dict, partitions=partitions)
    outbox = Outbox(app)
    checks: defaultdict[int, Validate] = defaultdict(Validate)
    Gate.before(app, (), timeout)

    async def count(stream: Any) -> None:
        async for event in stream.events():
            message = event.message
            where = {"topic": message.topic, "partition": message.partition, "offset": message.offset}
            item = decode_message(message.value, (message.topic, message.partition), message.offset, decode)
            [item] = checks[message.partition].push([item])
            if isinstance(item, DeadLetter):
                app.monitor.count("streamrec_dead_letters")
                if dead_letters is not None:
                    await outbox.bury(dead_letters, DeadLetter(where, item.reason, item.raw))
                continue
            shown = item.impression if isinstance(item, Labeled) else item
            if not isinstance(shown, Impression):
                app.monitor.count("streamrec_not_profiled")
                continue
            click = item.label if isinstance(item, Labeled) and item.kind == "click" else 0.0
            table[shown.user] = _profile(table[shown.user], shown.time, float(click), half_life)

    app.agent(raw_topic(app, topic), name=f"streamrec.profiles.{name}")(count)
    return table


def _profile(before: Mapping[str, float], time: float, click: float, half_life: float) -> dict[str, float]:
    """A profile after one more impression. An older event than the newest counts less by its age."""
    newest = max(time, before.get("time", time))
    fade = float(np.exp2((before.get("time", newest) - newest) / half_life))
    part = float(np.exp2((time - newest) / half_life))
    return {
        "impressions": before.get("impressions", 0) + 1,
        "clicks": before.get("clicks", 0) + click,
        "shown": before.get("shown", 0.0) * fade + part,
        "clicked": before.get("clicked", 0.0) * fade + part * click,
        "time": newest,
    }
