"""Rankings over HTTP: a web service of yours that follows a trainer, and never answers with half a version.

    python examples/ranking_service.py

`POST /rank` takes {"user", "candidates", "k"} and tells which version has answered. `GET /ready`: 200 when requests can
be answered, 503 before the first version and when the store has been silent for too long. `GET /status`: what is
served, and how old. Needs `pip install "streamrec[asgi]"`.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import streamrec as sr
from streamrec.serving import Follower

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))


def make_app(follower: Follower) -> Starlette:
    """The routes to mount in an application of yours, and the thread that follows the store while it is up."""

    async def rank(request: Request) -> JSONResponse:
        try:
            asked = await request.json()
            view = follower.scorer.view()  # all of this request is answered by one version
            best = view.rank(user=asked["user"], candidates=asked["candidates"], k=asked.get("k"))
        except sr.StoreError as error:
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
        except (ValueError, LookupError, TypeError) as error:
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 400)
        return JSONResponse({"version": view.version.number, "ranked": best})

    async def ready(request: Request) -> JSONResponse:
        return JSONResponse({"ready": follower.ready}, 200 if follower.ready else 503)

    async def status(request: Request) -> JSONResponse:
        told = follower.status()
        return JSONResponse(None if told is None else told._asdict())

    @contextlib.asynccontextmanager
    async def following(app: Starlette) -> AsyncIterator[None]:
        with follower:
            yield

    routes = [Route("/rank", rank, methods=["POST"]), Route("/ready", ready), Route("/status", status)]
    return Starlette(routes=routes, lifespan=following)


# -- what follows plays the rest of the world --------------------------------------------------------------------------


@contextlib.contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The app on a free port, in a thread; your own would be `uvicorn shop:app`."""
    config = uvicorn.Config(app, port=0, log_level="warning")
    socket = config.bind_socket()
    socket.listen()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield "http://{}:{}".format(*socket.getsockname())
    finally:
        server.should_exit = True
        thread.join()
        socket.close()


def ask(address: str, path: str, body: Any = None) -> tuple[int, Any]:
    """The status and the answer."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, data), timeout=30) as answer:
            return int(answer.status), json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def learn(trainer: sr.OnlineTrainer, start: int, liked: str) -> None:
    """Users click on the one artist and not on the other; then a version is published."""
    shown = [
        sr.Impression(f"i{n}", float(n), f"u{n % 50}", ["kahlo", "klee"][n // 50 % 2])
        for n in range(start, start + 5000)
    ]
    trainer.push([sr.Labeled(one, float(one.item == liked)) for one in shown])
    trainer.publish()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        follower = Follower(lambda: sr.Scorer(folder), every=0.05, stale_after=60.0)
        request = {"user": "u1", "candidates": ["klee", "kahlo"], "k": 1}
        with served(make_app(follower)) as address:
            print("before the first version:", *(ask(address, path)[0] for path in ("/ready", "/status")))
            trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=folder)
            for number, liked in enumerate(["kahlo", "klee"], 1):
                learn(trainer, 5000 * number, liked)
                while not follower.ready or follower.scorer.version.number < number:
                    threading.Event().wait(0.02)
                status, answer = ask(address, "/rank", request)
                print(f"{status}: version {answer['version']} says {answer['ranked'][0][0]}")
            print("ready:", ask(address, "/ready")[0], "no user:", ask(address, "/rank", {"candidates": []})[0])


if __name__ == "__main__":
    main()
