"""Events over HTTP: a web service of yours hands them in, and a thread beside it learns.

    python examples/asgi.py

`POST /events` takes JSON lines. 202: they are written down, and will be learned though the process be killed now. 503
with Retry-After: the queue is full, send them again later. 400: a line is no event, and none of them was taken.
Needs `pip install "streamrec[asgi]"`.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import streamrec as sr
from streamrec.events import decode_event, encode_lines

MAX_BODY = 1 << 20


def make_trainer(store: str) -> sr.OnlineTrainer:
    return sr.OnlineTrainer(
        model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("tags")), dim=8),
        preprocessors=[sr.Dedup(ttl=3600.0, capacity=1_000_000)],  # a client that got no answer sends again
        join=sr.LabelJoin(windows={"click": 1800.0}, lateness=60.0),
        metrics=[sr.AUC(), sr.NormalizedEntropy()],
        store=store,
        checkpoint_every=2_000,
    )


def make_app(source: sr.Push, trainer: sr.OnlineTrainer) -> Starlette:
    """The routes to mount in an application of yours, and the thread that learns while it is up."""

    async def events(request: Request) -> JSONResponse:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                return JSONResponse({"error": f"more than {MAX_BODY} bytes: send fewer events at a time"}, 413)
        try:
            found = [decode_event(line) for line in body.splitlines() if line.strip()]
            await source.aput(found, timeout=0.2)
        except sr.FullError as error:
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
        except sr.SourceError as error:  # it is shutting down, or its log cannot be written
            return JSONResponse({"error": str(error)}, 503)
        except (ValueError, RecursionError) as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({"accepted": len(found)}, 202)

    async def counts(request: Request) -> JSONResponse:
        return JSONResponse({**source.counts, "waiting": len(source)})

    @contextlib.asynccontextmanager
    async def learning(app: Starlette) -> AsyncIterator[None]:
        learner = threading.Thread(target=trainer.run, args=(source,), name="learner")
        learner.start()
        yield
        source.close()  # what was accepted is learned, a checkpoint is cut, and run returns
        learner.join()

    routes = [Route("/events", events, methods=["POST"]), Route("/counts", counts)]
    return Starlette(routes=routes, lifespan=learning)


# -- what follows plays the rest of the world --------------------------------------------------------------------------


@contextlib.contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The app on a free port, in a thread; your own would be `uvicorn shop:app`."""
    config = uvicorn.Config(app, port=0, log_level="warning")
    socket = config.bind_socket()
    socket.listen()  # who comes before the server is up waits
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield "http://{}:{}".format(*socket.getsockname())
    finally:
        server.should_exit = True
        thread.join()
        socket.close()


def post(address: str, body: bytes) -> int:
    """The status that the service answers with."""
    request = urllib.request.Request(f"{address}/events", data=body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def shown(start: int, count: int) -> Iterator[list[sr.Impression | sr.Feedback]]:
    """Fans of an artist click on her prints."""
    for n in range(start, start + count):
        rng = random.Random(n)
        user, artist = rng.randrange(200), rng.choice(["kahlo", "klee"])
        one = sr.Impression(f"i{n}", 60.0 * n, f"u{user}", f"{artist}-{n % 50}", {"tags": [artist, "print"]})
        clicked = rng.random() < (0.6 if (user % 2 == 0) == (artist == "kahlo") else 0.1)
        yield [one, sr.Feedback(f"c{n}", one.id, one.time + 20.0)] if clicked else [one]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for run in range(2):  # the second process goes on where the first has ended
            trainer = make_trainer(f"{folder}/store")
            source = sr.Push(log=f"{folder}/accepted", capacity=10_000, full="wait")
            with served(make_app(source, trainer)) as address:
                answers = [post(address, b'{"type":"purchase"}\n')]
                for first in range(run * 4_000, run * 4_000 + 4_000, 100):
                    events = [event for some in shown(first, 100) for event in some]
                    while (status := post(address, encode_lines(events))) == 503:  # as a client should
                        time.sleep(0.05)
                    answers.append(status)
            told = ", ".join(f"{answers.count(status)} answers {status}" for status in sorted({*answers}))
            print(f"Process {run + 1}: {told}; accepted {source.counts['accepted']:,} events")
        print(trainer.report(), "\n")
        ranked = sr.Scorer(f"{folder}/store").rank(
            user="u2", candidates=[sr.Candidate(f"{name}-7", {"tags": [name, "print"]}) for name in ("klee", "kahlo")]
        )
        print("u2", [(one.item, round(one.score, 3)) for one in ranked])

        full = sr.Push(capacity=50, full="refuse")  # and nobody who reads
        with served(Starlette(routes=make_app(full, trainer).routes)) as address:
            some = encode_lines([event for events in shown(0, 30) for event in events][:30])
            print("A queue of 50, three times 30 events:", [post(address, some) for _ in range(3)], dict(full.counts))


if __name__ == "__main__":
    main()
