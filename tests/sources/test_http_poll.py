"""A JSON API that fails, stalls and lies: a real server on the loopback, which does what each test tells it."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

import streamrec as sr
from streamrec.events import DeadLetter, Item, encode_event
from streamrec.sources import HttpPoll
from streamrec.sources.http_poll import Page
from streamrec.testing import check_source


def click(n: int) -> sr.Feedback:
    return sr.Feedback(f"f{n}", "i1", float(n))


class Api:
    """Events in pages of 5, the cursor being the number of the first; `faults` come before the right answers."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.faults: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.asked: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
                api.asked.append(query)
                api.headers.append(dict(self.headers))
                if api.faults:
                    api.faults.pop(0)(self)
                    return
                answer(self, api.page(int(query.get("cursor", 0))))

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/events"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def page(self, first: int) -> bytes:
        some = self.events[first : first + 5]
        following = first + 5 if len(self.events) > first + 5 else None
        return b'{"events": [%s], "next": %s}' % (b", ".join(some), json.dumps(following).encode())

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def answer(
    handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, length: int | None = None, **headers: str
) -> None:
    handler.send_response(status)
    told = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    for name, value in told.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def api() -> Iterator[Api]:
    served = Api()
    served.events = [encode_event(click(n)) for n in range(12)]
    try:
        yield served
    finally:
        served.close()


def poll(api: Api, **settings: Any) -> HttpPoll:
    return HttpPoll(api.url, **{"backoff": 0.001, "rng": random.Random(0), **settings})


def rest(source: Any, limit: int = 100) -> list[Item]:
    items: list[Item] = []
    while more := source.read(limit):
        items += more
    return items


def test_contract_over_pages(api: Api) -> None:
    api.events[3] = b'{"type": "purchase"}'
    api.events[7] = b"[1, {}]"
    check_source(lambda: poll(api))
    items = rest(poll(api, params={"limit": "5"}, headers={"Authorization": "Bearer t"}), 4)
    assert api.asked[-3:] == [{"limit": "5"}, {"limit": "5", "cursor": "5"}, {"limit": "5", "cursor": "10"}]
    assert api.headers[-1]["Authorization"] == "Bearer t" and "gzip" in api.headers[-1]["Accept-Encoding"]
    bad = [(n, item.position) for n, item in enumerate(items) if isinstance(item, DeadLetter)]
    assert bad == [(3, {"cursor": None, "skip": 3}), (7, {"cursor": 5, "skip": 2})]
    assert [item for item in items if not isinstance(item, DeadLetter)] == [
        click(n) for n in range(12) if n not in (3, 7)
    ]


def stall(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.6)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, each in time: the whole never is."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    try:
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


FAULTS: dict[str, tuple[Callable[[BaseHTTPRequestHandler], None], str]] = {
    "500": (lambda handler: answer(handler, b"", 500), "status 500"),
    "503": (lambda handler: answer(handler, b"", 503, Retry_After="0"), "status 503"),
    "429": (lambda handler: answer(handler, b"", 429, Retry_After="Thu, 01 Jan 1970 00:00:00 GMT"), "status 429"),
    "429, nonsense": (lambda handler: answer(handler, b"", 429, Retry_After="soon"), "status 429"),
    "hangs up": (lambda handler: handler.connection.close(), "RemoteDisconnected|closed|reset"),
    "cut short": (lambda handler: answer(handler, b'{"events": []', length=50), "cut short"),
    "cut gzip": (
        lambda handler: answer(handler, gzip.compress(b'{"events": []}')[:-6], Content_Encoding="gzip"),
        "cut short",
    ),
    "damaged gzip": (lambda handler: answer(handler, b"no gzip at all", Content_Encoding="gzip"), "damaged"),
    "another coding": (lambda handler: answer(handler, b"{}", Content_Encoding="br"), "coded as 'br'"),
    "a page of HTML": (lambda handler: answer(handler, b"<html>", Content_Type="text/html"), "text/html, not JSON"),
    "no JSON": (lambda handler: answer(handler, b"<html>"), "no page"),
    "another object": (lambda handler: answer(handler, b'{"data": []}'), "no 'events', but data"),
    "an odd cursor": (lambda handler: answer(handler, b'{"events": [], "next": {}}'), "no page"),
    "too large": (lambda handler: answer(handler, b" " * 5_000), "more than max_body = 4000"),
    "a bomb": (
        lambda handler: answer(handler, gzip.compress(b" " * 50_000_000), Content_Encoding="gzip"),
        "more than max_body = 4000",
    ),
    "stalls": (stall, "timed out"),
    "drips": (drip, "no whole answer in 0.3 seconds|timed out"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_fails_is_tried_again_and_told_in_the_end(api: Api, name: str) -> None:
    fault, words = FAULTS[name]
    timeout = 0.3 if name in ("stalls", "drips") else 20.0
    api.faults = [fault, fault]
    source = poll(api, max_body=4_000, retries=2, timeout=timeout)
    assert source.read(3) == [click(0), click(1), click(2)]
    assert len(api.asked) == 3
    source.read(2)
    stood = source.position()
    api.faults = [fault] * 3
    with pytest.raises(sr.SourceError, match=rf"failed 3 times, at last: .*({words})"):
        source.read(3)
    assert source.position() in (stood, {"cursor": 5, "skip": 0})  # the end of a page is the beginning of the next
    assert rest(source) == [click(n) for n in range(5, 12)]


@pytest.mark.parametrize(
    ("status", "words"), [(401, "status 401"), (404, "404"), (410, "410"), (302, "to 'http://x/'")]
)
def test_what_will_not_change_is_told_at_once(api: Api, status: int, words: str) -> None:
    api.faults = [lambda handler: answer(handler, b"", status, Location="http://x/")]
    with pytest.raises(sr.SourceError, match=words):
        poll(api).read(1)
    assert len(api.asked) == 1


def test_the_same_cursor_for_ever(api: Api) -> None:
    api.page = lambda first: b'{"events": [%s], "next": 0}' % b",".join(api.events)  # type: ignore[method-assign]
    source = poll(api)
    source.seek({"cursor": 0, "skip": 0})
    assert rest(source) == [click(n) for n in range(12)]  # once: it is the last page, which may grow
    api.page = lambda first: b'{"events": [%s], "next": %d}' % (api.events[0], (first + 1) % 3)  # type: ignore[method-assign]
    source = poll(api)
    source.seek({"cursor": 0, "skip": 0})
    with pytest.raises(sr.SourceError, match="goes in circles"):
        rest(source)


def test_the_last_page_grows(api: Api) -> None:
    source = poll(api, follow=True, every=0.01)
    assert len([one for _ in range(3) for one in source.read(5)]) == 12
    saved = json.dumps(source.position())
    assert not source.wait(0.05)
    api.events += [encode_event(click(n)) for n in range(12, 17)]
    assert source.read(100) == [click(12), click(13), click(14)]
    assert source.read(100) == [click(15), click(16)]
    source.close()
    assert source.read(1) == []
    again = poll(api, follow=True, every=0.01, idle=0.05)
    again.seek(json.loads(saved))
    assert rest(again) == [click(n) for n in range(12, 17)]


def test_a_page_that_has_become_shorter_is_told_once(api: Api) -> None:
    source = poll(api)
    rest(source)
    saved = source.position()
    del api.events[11:]
    source = poll(api)
    source.seek(saved)
    gap, *items = rest(source)
    assert isinstance(gap, DeadLetter) and gap.reason == "gap: the page had 2 events and now has 1" and items == []


def test_backoff_is_drawn_from_the_given_rng_and_retry_after_is_heard(api: Api) -> None:
    class Rng(random.Random):
        drawn: list[tuple[float, float]] = []  # noqa: RUF012

        def uniform(self, low: float, high: float) -> float:
            self.drawn.append((low, high))
            return 0.0

    api.faults = [FAULTS["500"][0], FAULTS["503"][0], FAULTS["500"][0]]
    assert poll(api, rng=Rng(), backoff=1e9).read(1) == [click(0)]
    assert Rng.drawn == [(0.5, 1.0), (0.5, 1.0)]  # not where the service has said how long


def test_a_body_of_another_shape(api: Api) -> None:
    api.page = lambda first: b'{"data": {"items": [1, 2]}}'  # type: ignore[method-assign]

    def page(body: bytes) -> Page:
        return Page([b"%d" % one for one in json.loads(body)["data"]["items"]], None)

    assert rest(poll(api, page=page, decode=lambda raw: click(int(raw)))) == [click(1), click(2)]
    api.page = lambda first: b'{"rows": [%s], "after": null}' % api.events[0]  # type: ignore[method-assign]
    assert rest(poll(api, events="rows", next="after")) == [click(0)]


def test_what_it_refuses(api: Api) -> None:
    for words, settings_ in (
        ("every must", {"every": 0}),
        ("timeout must", {"timeout": 0}),
        ("backoff must", {"backoff": -1}),
        ("retries must", {"retries": -1}),
        ("max_body must", {"max_body": 0}),
        ("add follow=True", {"idle": 1.0}),
    ):
        with pytest.raises(sr.ConfigError, match=words):
            poll(api, **settings_)
    source = poll(api, headers={"Authorization": "secret"})
    for position in ({}, {"cursor": 1.5, "skip": 0}, {"cursor": None, "skip": -1}, {"cursor": None}):
        with pytest.raises(sr.SourceError, match="no position"):
            source.seek(position)
    assert "secret" not in repr(source)


WAITING = """
import sys
import streamrec as sr

class Told(sr.HttpPoll):
    def wait(self, seconds):
        print("waits", flush=True)
        return super().wait(seconds)

trainer = sr.OnlineTrainer(model=sr.FM(sr.Schema(sr.Id("user")), dim=4))
print(trainer.run(Told(sys.argv[1], timeout=600.0)).interrupted, flush=True)
"""


def test_sigterm_does_not_wait_for_the_service(api: Api) -> None:
    release = threading.Event()
    api.faults = [lambda handler: release.wait(120)]
    with subprocess.Popen([sys.executable, "-c", WAITING, api.url], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "waits\n"
        child.send_signal(signal.SIGTERM)
        told = child.stdout.read()
        assert child.wait(timeout=60) == 0 and told.splitlines()[-1] == "True"
    release.set()
