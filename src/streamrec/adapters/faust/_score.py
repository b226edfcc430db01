"""score: ranking requests on one topic, answered on another."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import msgspec

from streamrec.adapters.faust._gate import Gate
from streamrec.adapters.faust._outbox import Message, Outbox
from streamrec.adapters.faust._topics import raw_topic, topic_name
from streamrec.events import DeadLetter
from streamrec.serving import Candidate, Scorer

__all__ = ["ScoreRequest", "ScoreResponse", "score"]


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
    app: Any,
    requests_topic: Any,
    responses_topic: Any,
    scorer: Scorer,
    *,
    dead_letters: str | None = None,
    timeout: float = 30.0,
) -> Any:
    """Answer ranking requests on one topic with responses on another, keyed by the request's id; returns the agent.

    `ScoreRequest` and `ScoreResponse` say what they hold, as JSON. A request that cannot be read is answered with its
    `error` where it has an id, and goes to `dead_letters`, if that is given; the stream goes on. Each request is
    answered at least once: after a crash, some twice. The scorer works on a thread of its own, so several requests do
    not hold up the app's loop. Workers share the requests' partitions as Faust's agents do; each has a scorer.
    `timeout`: seconds without an answer from a broker after which the app's start fails with a `SourceError`.
    """
    requests, responses = raw_topic(app, requests_topic), topic_name(responses_topic)
    decoder = msgspec.json.Decoder(ScoreRequest)
    outbox = Outbox(app)
    Gate.before(app, (), timeout)
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
                    await outbox.bury(dead_letters, DeadLetter(where, reason, value or b""))
                if not found.id:
                    continue
            reply = msgspec.json.encode(found)
            if await outbox.send(responses, [Message(found.id.encode(), reply)]):
                reason = f"the answer of {len(reply)} bytes is too large for topic {responses!r}; ask with a smaller k"
                reply = msgspec.json.encode(ScoreResponse(found.id, error=reason))
                await outbox.send(responses, [Message(found.id.encode(), reply)])
            app.monitor.count("streamrec_answered")

    return app.agent(requests, name=f"streamrec.score.{requests.topics[0]}")(respond)


class _OnlyId(msgspec.Struct):
    id: str = ""


def _id(value: bytes | None) -> str:
    with suppress(ValueError, RecursionError):
        return msgspec.json.decode(value or b"{}", type=_OnlyId).id
    return ""
