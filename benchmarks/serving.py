"""Rankings over HTTP while versions are swapped: `python -m benchmarks.serving [--seconds 60] [--clients 16]`.

The service of examples/ranking_service.py in a process of its own, and clients in this one, who each ask again when
they were answered. A trainer in a third process learns and publishes a version every second, or none. Each answer says
its version, and is compared, number for number, with what that version says when it is read from the store afterwards.
Then how long it takes from events to a version that is served, a million rows, one in a hundred of which is learned.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import streamrec as sr
from benchmarks._measure import environment, one_thread
from streamrec.serving import Follower, View
from streamrec.serving._loader import Loader

USERS, ITEMS, CANDIDATES = 100_000, 10_000, 100
SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))


class Answer(NamedTuple):
    """What one request came to. `seconds`: until the answer was read; `request`: which of those there are."""

    status: int
    seconds: float
    request: int
    version: int
    ranked: Sequence[Any]


def requests(count: int = 64) -> list[dict[str, Any]]:
    """Different ones, of users and items that are learned."""
    rng = np.random.default_rng(1)
    return [
        {"user": f"u{rng.integers(USERS)}", "candidates": [f"p{n}" for n in rng.integers(ITEMS, size=CANDIDATES)]}
        for _ in range(count)
    ]


async def ask(port: int, asked: Sequence[Any], clients: int, seconds: float, pause: float = 0.0) -> list[Answer]:
    """What so many clients are answered, each over a connection that is kept. `pause`: seconds between two requests."""
    bodies = [json.dumps(one).encode() for one in asked]
    heads = [b"POST /rank HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) for body in bodies]
    answers: list[Answer] = []
    ends = time.perf_counter() + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        turn = number
        while (begun := time.perf_counter()) < ends:
            which = turn % len(bodies)
            writer.write(heads[which] + bodies[which])
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            body = json.loads(await reader.readexactly(int(head.split("content-length:")[1].split()[0])))
            taken = time.perf_counter() - begun
            answers.append(Answer(int(head.split()[1]), taken, which, body.get("version", 0), body.get("ranked", ())))
            turn += clients
            if pause:
                await asyncio.sleep(pause)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return answers


def wrong(answers: Sequence[Answer], asked: Sequence[Any], store: sr.Store) -> tuple[int, int]:
    """How many failed, and how many are not, bit for bit, what the version that they name says."""
    failed = sum(one.status != 200 for one in answers)
    mixed = 0
    for number in {one.version for one in answers if one.status == 200}:
        serving = Loader(store.versions, None).whole(number)
        assert serving is not None
        view = View(serving, lambda *_: None)
        says = [[list(one) for one in view.rank(**request)] for request in asked]
        mixed += sum(one.ranked != says[one.request] for one in answers if one.version == number)
    return failed, mixed


def publish(uri: str, every: float | None, started: Any, ended: Any, seed: int = 0) -> None:
    """A trainer: a version at first, and one `every` so many seconds, after 1,000 events each, until `ended` is set."""
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=16), store=sr.Store(uri, keep=1000), background=False)

    def learn(count: int) -> None:
        users, items = rng.integers(USERS, size=count), rng.integers(ITEMS, size=count)
        shown = [sr.Impression(f"i{n}", 0.0, f"u{users[n]}", f"p{items[n]}") for n in range(count)]
        trainer.push([sr.Labeled(one, float(n)) for one, n in zip(shown, rng.integers(2, size=count), strict=True)])
        trainer.publish()

    learn(2 * USERS)
    started.set()
    begun, turn = time.monotonic(), 1
    while every is not None and not ended.wait(max(0.0, begun + turn * every - time.monotonic())):
        learn(1000)
        turn += 1


def serve(uri: str, port: Any, refreshes: float) -> None:
    import torch
    import uvicorn

    from examples.ranking_service import make_app

    torch.set_num_threads(1)
    config = uvicorn.Config(make_app(Follower(sr.Scorer(uri), every=refreshes)), port=0, log_level="warning")
    socket = config.bind_socket()
    socket.listen()
    port.value = socket.getsockname()[1]
    uvicorn.Server(config).run(sockets=[socket])


def once(seconds: float, clients: int, pause: float, every: float | None) -> list[float]:
    """Milliseconds that requests took, with a version `every` so many seconds; prints what came of them."""
    spawn = multiprocessing.get_context("spawn")
    asked = requests()
    with tempfile.TemporaryDirectory() as folder:
        started, ended, port = spawn.Event(), spawn.Event(), spawn.Value("i", 0)
        trainer = spawn.Process(target=publish, args=(folder, every, started, ended), daemon=True)
        trainer.start()
        started.wait()
        service = spawn.Process(target=serve, args=(folder, port, 0.1), daemon=True)
        service.start()
        try:
            while not port.value:
                time.sleep(0.1)
            asyncio.run(ask(port.value, asked, clients, 2.0, pause))
            answers = asyncio.run(ask(port.value, asked, clients, seconds, pause))
        finally:
            for process in (service, trainer):
                process.kill()
                process.join()
        failed, mixed = wrong(answers, asked, sr.Store(folder, keep=1000))
    taken = sorted(1000 * one.seconds for one in answers)
    p50, p99 = taken[len(taken) // 2], taken[len(taken) * 99 // 100]
    versions = len({one.version for one in answers})
    name = "no swap" if every is None else f"a version every {every:g} s"
    print(
        f"| {name} | {len(answers):,} | {versions} | {failed} | {mixed} | {p50:.2f} | {p99:.2f} | {taken[-1]:.1f} |",
        flush=True,
    )
    return [p50, p99]


def fresh(rows: int = 1_000_000, turns: int = 20) -> None:
    """Print how long it takes from events of 1 % of the rows, handed to the trainer, until a follower serves them."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=16), store=sr.Store(folder), background=False)

        def learn(users: Sequence[int]) -> None:
            shown = [sr.Impression(f"i{n}", 0.0, f"u{user}", f"p{user % ITEMS}") for n, user in enumerate(users)]
            trainer.push([sr.Labeled(one, float(n % 2)) for n, one in enumerate(shown)])

        for begin in range(0, rows, 50_000):
            learn(range(begin, begin + 50_000))
        trainer.publish()
        scorer = sr.Scorer(folder)
        taken = []
        with Follower(scorer, every=0.1):
            for _ in range(turns):
                users = rng.choice(rows, rows // 100, replace=False).tolist()
                begun = time.monotonic()
                learn(users)
                number = trainer.publish().number
                while scorer.version.number < number:
                    time.sleep(0.001)
                taken.append(time.monotonic() - begun)
    print(
        f"\nFrom {rows // 100:,} events to served, {rows:,} users of dim 16, a look every 0.1 s: median "
        f"{statistics.median(taken):.2f} s, longest {max(taken):.2f} s"
    )


def main(seconds: float, clients: int, pause: float, rounds: int) -> None:
    print(f"{environment()}\n{clients} clients, {CANDIDATES} candidates a request, {pause * 1000:g} ms between two\n")
    print("| | requests | versions | failed | mixed | p50 ms | p99 ms | longest ms |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    ratios = []
    for _ in range(rounds):
        still = once(seconds, clients, pause, None)
        ratios.append(once(seconds, clients, pause, 1.0)[1] / still[1])
    print(f"\np99 with swaps over p99 without: {statistics.median(ratios):.2f}")
    fresh()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds: a busy service is no saturated one")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    main(given.seconds, given.clients, given.pause, given.rounds)
