"""Faust: a trainer, a scorer and user profiles inside an app of your own.

Each function takes your `faust.App` and registers something with it; nothing starts before your worker does, and
importing this starts nothing. Needs `pip install "streamrec[faust]"`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np

try:
    from aiokafka.errors import MessageSizeTooLargeError
    from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth
    from mode import Service
except ImportError as error:
    raise ImportError(f'streamrec.adapters.faust needs Faust: pip install "streamrec[faust]" ({error})') from error

from streamrec.adapters._election import Election, NotElected
from streamrec.errors import ConfigError, SourceError, StoreError
from streamrec.events import DeadLetter, Event, Impression, Item, Labeled, Position, decode_event
from streamrec.serving import Candidate, Scorer
from streamrec.sources import Kafka
from streamrec.sources.kafka import decode_message
from streamrec.trainers import OnlineTrainer

__all__ = ["Notice", "ScoreRequest", "ScoreResponse", "profiles", "score", "train"]

log = logging.getLogger(__name__)

_CUT = 4096  # bytes kept of a message that the broker refuses as too large for the dead letters' topic
_ANSWER = 20.0  # seconds the broker may take for what a checkpoint waits for


class Notice(msgspec.Struct, frozen=True):
    """Word that a version has been published: which store, which number."""

    store: str
    version: int


# -- training ----------------------------------------------------------------------------------------------------------


def train(
    app: Any,
    topic: Any,
    trainer: OnlineTrainer,
    *,
    batch: int = 256,
    seconds: float = 0.5,
    decode: Callable[[bytes], Event] = decode_event,
    dead_letters: str | None = None,
    notices: str | None = None,
    prefetch: int = 10_000,
    timeout: float = 30.0,
    client: Mapping[str, Any] | None = None,
) -> None:
    """Let `trainer` learn from `topic` while the worker runs: each event exactly once, however often it is killed.

    Offsets are part of the trainer's checkpoints, so it needs a store. The messages are read by
    `streamrec.sources.Kafka` on a thread of its own, beside Faust's consumer, and learned on one more; the app's event
    loop waits for neither. Pushed is what has come, at most `batch` events; the thread looks around every `seconds`
    without any. At most `prefetch` messages are held ahead: while as many wait, nothing more is fetched.

    Of several workers that call this with the same app id and topic **one** learns, for a model has one owner; the
    others stand by. When it leaves or dies, another takes over from the newest checkpoint in the store, which they
    share. After each checkpoint its offsets are committed to the group `"{app id}-{topic}-trainer"`, from which
    nothing is read: it shows the lag, and it keeps a worker that was declared dead from writing.

    `dead_letters`: a topic for messages that do not decode, with the headers `topic`, `partition`, `offset` and
    `reason`, sent before the checkpoint behind them. `notices`: a topic that is told of every published version, for
    `streamrec.serving.StoreNotifier`. `timeout`: seconds without an answer from a broker after which the worker
    crashes; until then it is tried again. `client`: more settings for aiokafka. How long a dead
    worker goes unnoticed is the app's `broker_session_timeout`, in seconds.

    An error of the store, or of the trainer, crashes the worker: start it again and it goes on from the last
    checkpoint. The app's monitor counts `streamrec_events`, `streamrec_dead_letters`, `streamrec_checkpoints`.

    Raises `ConfigError` where the trainer has no store, or a setting cannot work.
    """
    if trainer.store is None:
        raise ConfigError(
            'the offsets are kept in the trainer\'s checkpoints: give it a store, such as store="runs/ctr"'
        )
    if batch < 1:
        raise ConfigError(f"batch must be >= 1 event, got {batch!r}")
    if not seconds > 0:
        raise ConfigError(f"seconds must be > 0, got {seconds!r}")
    settings = _Settings(_name(topic), batch, seconds, decode, dead_letters, notices, prefetch, timeout, client or {})

    class Trainer(_Trainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(app, trainer, settings, **kwargs)

    app.service(Trainer)


class _Settings(msgspec.Struct, frozen=True):
    topic: str
    batch: int
    seconds: float
    decode: Callable[[bytes], Event]
    dead_letters: str | None
    notices: str | None
    prefetch: int
    timeout: float
    client: Mapping[str, Any]


class _Trainer(Service):
    """Owns the trainer while this worker is elected, and stands by while it is not."""

    def __init__(self, app: Any, trainer: OnlineTrainer, settings: _Settings, **kwargs: Any) -> None:
        self._app, self._trainer, self._settings = app, trainer, settings
        self._version = 0  # of the newest checkpoint that is in memory; 0: none
        self._election: Election | None = None
        self._learner: threading.Thread | None = None
        self._enough = threading.Event()
        self._main: asyncio.AbstractEventLoop | None = None
        super().__init__(**kwargs)

    async def on_start(self) -> None:
        self._main = asyncio.get_running_loop()
        client = _client(self._app)
        deadline = self._main.time() + self._settings.timeout
        while True:
            self._election = Election(
                self._settings.topic,
                f"{self._app.conf.id}-{self._settings.topic}-trainer",
                {
                    **client,
                    "session_timeout_ms": int(1000 * self._app.conf.broker_session_timeout),
                    "heartbeat_interval_ms": int(1000 * self._app.conf.broker_heartbeat_interval),
                    **self._settings.client,
                },
                won=self._begin,
                lost=self._end,
                rank=lambda: self._version,
            )
            try:
                await asyncio.wait_for(self._election.start(), max(0.1, deadline - self._main.time()))
                return
            except Exception as error:
                with suppress(Exception):
                    await asyncio.wait_for(self._election.stop(), 5.0)
                if self._main.time() >= deadline:
                    raise SourceError(
                        f"no broker has answered at {client['bootstrap_servers']} for {self._settings.timeout:g} s "
                        f"({error}); check the app's broker setting, and that the broker is up"
                    ) from error
                await asyncio.sleep(0.2)

    async def on_stop(self) -> None:
        await self._end()
        if self._election is not None:
            with suppress(Exception):  # a broker that does not hear it finds out by itself
                await asyncio.wait_for(self._election.stop(), 3.0)

    async def _begin(self) -> None:
        """This worker owns the topic now."""
        await self._end()
        self._enough.clear()
        self._learner = threading.Thread(target=self._learn, name="streamrec-learn", daemon=True)
        self._learner.start()

    async def _end(self) -> None:
        """Finish the batch in hand, cut a checkpoint, and stop learning."""
        learner, self._learner = self._learner, None
        if learner is not None:
            self._enough.set()
            await asyncio.get_running_loop().run_in_executor(None, learner.join)

    # -- on the learner's thread ---------------------------------------------------------------------------------------

    def _learn(self) -> None:
        try:
            self._follow()
        except NotElected:
            log.warning("another worker owns %r by now; standing by", self._settings.topic)
            self._version = 0  # what was learned since the last checkpoint is read again by the other one
        except Exception as error:
            self._call(self._fail, error)

    async def _give_up(self, error: Exception) -> None:
        await self.crash(error)

    def _fail(self, error: Exception) -> None:
        self._version = 0
        log.error("the trainer has stopped: %s", error, exc_info=error)
        self.add_future(self._give_up(error))

    def _follow(self) -> None:
        settings, trainer, store = self._settings, self._trainer, self._trainer.store
        assert store is not None
        with Kafka(
            settings.topic,
            _client(self._app)["bootstrap_servers"],
            decode=settings.decode,
            follow=True,
            idle=settings.seconds,
            timeout=settings.timeout,
            prefetch=settings.prefetch,
            client={**_client(self._app, servers=False), **_without_group(settings.client)},
        ) as source:
            newest = store.checkpoints.latest()
            if newest is not None and newest.number != self._version:
                position = trainer.resume()
                self._version = newest.number
                self._saved: Position = position or {}
                if position is not None:
                    source.seek(position)
            elif newest is not None:  # nobody else has owned it since
                source.seek(self._saved)
            elif trainer.report().counts["events"]:
                raise StoreError(
                    "the store is empty, but the trainer has learned already: cut a checkpoint before the app starts"
                )
            else:
                self._saved = source.position()
            log.info("this worker owns %r and learns from it, from %s", settings.topic, self._saved)
            letters: list[Future[Any]] = []
            at = self._saved
            while not self._enough.is_set():
                items = source.read(settings.batch)
                if items:
                    letters += self._told(items)
                    trainer.push(items)
                    at = source.position()
                    self._call(self._app.monitor.count, "streamrec_events", len(items))
                if trainer.checkpoint_due and at != self._saved:
                    self._checkpoint(at, letters)
            if at != self._saved:
                self._checkpoint(at, letters)

    def _told(self, items: Sequence[Item]) -> list[Future[Any]]:
        """Send the dead letters among these to their topic."""
        letters = [one for one in items if isinstance(one, DeadLetter)]
        if letters:
            self._call(self._app.monitor.count, "streamrec_dead_letters", len(letters))
        topic = self._settings.dead_letters
        return [] if topic is None else [self._ask(_bury(self._app, topic, one)) for one in letters]

    def _checkpoint(self, at: Position, letters: list[Future[Any]]) -> None:
        """Save, if this worker still owns the topic; raises `NotElected` where it does not."""
        for sent in letters:
            sent.result(_ANSWER)  # first: behind the checkpoint, nobody would send them again
        letters.clear()
        store = self._trainer.store
        assert store is not None and self._election is not None
        # Twice, since a worker may sleep at any place: by the broker, and by what is in the store.
        self._commit(self._saved)
        newest = store.checkpoints.latest()
        if newest is not None and newest.number != self._version:
            raise NotElected
        version = self._trainer.checkpoint(at)
        self._version, self._saved = version.number, at
        self._call(self._app.monitor.count, "streamrec_checkpoints", 1)
        self._commit(at)
        if self._settings.notices is not None:
            published = store.versions.latest()
            if published is not None:
                notice = msgspec.json.encode(Notice(store.uri, published.number))
                with suppress(Exception):  # a scorer that misses it looks by itself, later
                    self._ask(_send(self._app, self._settings.notices, b"version", notice)).result(_ANSWER)

    def _commit(self, at: Position) -> None:
        assert self._election is not None
        offsets = {int(number): offset for number, offset in at.get(self._settings.topic, {}).items()}
        self._ask(self._election.commit(offsets)).result(_ANSWER)

    def _ask(self, todo: Coroutine[Any, Any, Any]) -> Future[Any]:
        assert self._main is not None
        return asyncio.run_coroutine_threadsafe(todo, self._main)

    def _call(self, todo: Callable[..., Any], *arguments: Any) -> None:
        assert self._main is not None
        with suppress(RuntimeError):  # the loop has ended
            self._main.call_soon_threadsafe(todo, *arguments)


# -- scoring -----------------------------------------------------------------------------------------------------------


class ScoreRequest(msgspec.Struct, frozen=True):
    """What `score` reads: a user, and the items that might be shown. `k`: how many of the best to give; None: all."""

    id: str
    user: str
    candidates: list[str | Candidate]
    k: int | None = None
    features: dict[str, Any] = {}


class ScoreResponse(msgspec.Struct, frozen=True):
    """What `score` answers to the request `id`: items and click probabilities, best first; or what is wrong with it."""

    id: str
    items: list[str] = []
    scores: list[float] = []
    version: int | None = None
    error: str | None = None


def score(
    app: Any, requests_topic: Any, responses_topic: Any, scorer: Scorer, *, dead_letters: str | None = None
) -> Any:
    """Answer ranking requests on one topic with responses on another, keyed by the request's id; returns the agent.

    `ScoreRequest` and `ScoreResponse` say what they hold, as JSON. A request that cannot be read is answered with its
    `error` where it has an id, and goes to `dead_letters`, if that is given; the stream goes on. Each request is
    answered at least once: after a crash, some twice. The scorer works on a thread of its own, so several requests do
    not hold up the app's loop. Workers share the requests' partitions as Faust's agents do; each has a scorer.
    """
    requests, responses = _raw(app, requests_topic), _name(responses_topic)
    decoder = msgspec.json.Decoder(ScoreRequest)
    thread = ThreadPoolExecutor(1, thread_name_prefix="streamrec-score")

    def answer(request: ScoreRequest) -> ScoreResponse:
        best = scorer.rank(user=request.user, candidates=request.candidates, k=request.k, features=request.features)
        return ScoreResponse(request.id, [one.item for one in best], [one.score for one in best], scorer.version.number)

    async def respond(stream: Any) -> None:
        async for event in stream.events():
            message = event.message
            value = message.value
            try:
                request = decoder.decode(value or b"")
                found = await asyncio.get_running_loop().run_in_executor(thread, answer, request)
            except Exception as error:  # a request may hold anything, and none may stop the stream
                app.monitor.count("streamrec_bad_requests")
                reason = f"bad request: {error} ({type(error).__name__})"[:500]
                found = ScoreResponse(_id(value), error=reason)
                if dead_letters is not None:
                    where = {"topic": message.topic, "partition": message.partition, "offset": message.offset}
                    await _bury(app, dead_letters, DeadLetter(where, reason, value or b""))
                if not found.id:
                    continue
            await _send(app, responses, found.id.encode(), msgspec.json.encode(found))
            app.monitor.count("streamrec_answered")

    return app.agent(requests, name=f"streamrec.score.{requests.topics[0]}")(respond)


class _OnlyId(msgspec.Struct):
    id: str = ""


def _id(value: bytes | None) -> str:
    with suppress(ValueError, RecursionError):
        return msgspec.json.decode(value or b"{}", type=_OnlyId).id
    return ""


# -- profiles ----------------------------------------------------------------------------------------------------------


def profiles(
    app: Any,
    topic: Any,
    *,
    name: str = "profiles",
    half_life: float = 86_400.0,
    partitions: int | None = None,
    decode: Callable[[bytes], Event] = decode_event,
) -> Any:
    """Keep a profile of each user in a Faust `Table`, from a topic of impressions or labelled examples; returns it.

    The topic must be keyed by user, so that one worker sees all of a user. `table[user]` is a mapping:
    `impressions` and `clicks`, counts since the start (`clicks` from `Labeled` items of kind "click" alone); `shown`
    and `clicked`, the same with each event counting half as much every `half_life` seconds of event time, so
    that `clicked / shown` is a recent rate; `time`, of the newest event. Faust writes each change to the table's
    changelog topic and reads it back when a worker starts. Counts are at least once: Faust may hand an event over
    again after a crash. `partitions`: those of the topic, if not the app's default.

    Raises `ConfigError` where `half_life` is not above 0 seconds.
    """
    if not 0 < half_life < float("inf"):
        raise ConfigError(f"half_life must be > 0 seconds and finite, got {half_life!r}")
    table = app.Table(name, default=dict, partitions=partitions)

    async def count(stream: Any) -> None:
        async for event in stream.events():
            message = event.message
            item = decode_message(message.value, (message.topic, message.partition), message.offset, decode)
            shown = item.impression if isinstance(item, Labeled) else item
            if not isinstance(shown, Impression):
                app.monitor.count("streamrec_not_profiled")
                continue
            click = item.label if isinstance(item, Labeled) and item.kind == "click" else 0.0
            table[shown.user] = _profile(table[shown.user], shown.time, float(click), half_life)

    app.agent(_raw(app, topic), name=f"streamrec.profiles.{name}")(count)
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


# -- what all of them need ---------------------------------------------------------------------------------------------


def _name(topic: Any) -> str:
    """The name of a topic: a string, or one of Faust's channels of exactly one topic."""
    if isinstance(topic, str) and topic:
        return topic
    names = list(getattr(topic, "topics", None) or ())
    if len(names) != 1:
        raise ConfigError(f"topic must be a name, or app.topic() of one name, got {topic!r}")
    return str(names[0])


def _raw(app: Any, topic: Any) -> Any:
    """A topic whose values are the bytes as they came: our decoders read them, and no bad one stops a stream."""
    return app.topic(_name(topic), key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")


async def _send(app: Any, topic: str, key: bytes, value: bytes, headers: Mapping[str, bytes] | None = None) -> None:
    """Send, and wait until the broker has it."""
    producer = await app.maybe_start_producer()
    await producer.send_and_wait(topic, key, value, None, None, dict(headers or {}))


async def _bury(app: Any, topic: str, letter: DeadLetter) -> None:
    """Send a dead letter to its topic."""
    headers = {name: str(value).encode() for name, value in letter.position.items()}
    headers["reason"] = letter.reason.encode("utf-8", "replace")
    key = headers.get("topic", b"") + b"/" + headers.get("partition", b"") + b"/" + headers.get("offset", b"")
    try:
        await _send(app, topic, key, letter.raw, headers)
    except MessageSizeTooLargeError:
        headers["cut"] = str(len(letter.raw)).encode()  # its size before
        await _send(app, topic, key, letter.raw[:_CUT], headers)


def _client(app: Any, *, servers: bool = True) -> dict[str, Any]:
    """The app's own way to its brokers, as settings for aiokafka."""
    conf = app.conf
    auth = dict(credentials_to_aiokafka_auth(conf.broker_credentials, conf.ssl_context))
    auth["client_id"] = conf.broker_client_id
    if servers:
        auth["bootstrap_servers"] = [f"{url.host}:{url.port or 9092}" for url in conf.broker]
    return auth


def _without_group(client: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in client.items() if name not in ("session_timeout_ms", "heartbeat_interval_ms")
    }
