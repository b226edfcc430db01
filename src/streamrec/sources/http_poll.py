"""HttpPoll: events behind a JSON API, page by page."""

from __future__ import annotations

import random
import threading
import time
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import NamedTuple, Union
from urllib.parse import urlencode, urlsplit, urlunsplit

import msgspec

from streamrec.errors import ConfigError, SourceError
from streamrec.events import Event, Item, Position, decode_event
from streamrec.sources._closing import ClosedAtItsEnd
from streamrec.sources._lines import letter, read_one
from streamrec.sources._waiting import Waiting

__all__ = ["HttpPoll", "Page"]

Cursor = Union[str, int, None]
_REMEMBERED = 1_000  # cursors that must not come again
_CHUNK = 1 << 16
_LOOK = 0.1  # seconds between two looks whether it is time to ask again
_LONGEST = 60.0  # seconds between two tries
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))


class Page(NamedTuple):
    """What a body holds: each event's bytes, and the cursor of the page behind it; None where this is the last."""

    events: Sequence[bytes]
    next: Cursor


class Settings(NamedTuple):
    """How a page is asked for."""

    page: Callable[[bytes], Page]
    timeout: float
    retries: int
    backoff: float
    max_body: int
    rng: random.Random


class HttpPoll(ClosedAtItsEnd):
    """A source over a JSON API that gives events by pages, each with the cursor of the next.

    `GET url?cursor=...` answers `{"events": [...], "next": ...}`; the first request has no cursor. Other names:
    `cursor`, the parameter, and `events`, `next`, the keys; `params`: more parameters; `headers`: a token, say. `page`
    reads any other body. `decode` reads one event; one on which it raises is a `DeadLetter` in its place.

    The last page, whose next cursor is none or its own, is asked for again, and what has been added to it comes then:
    every `every` seconds with `follow`, until there was none for `idle` seconds (None: never); else `read` ends there.
    It ends too when `close` is called, and when SIGTERM or SIGINT comes (in the main thread). Requests run in a thread,
    so that none of them is waited for then.

    **Its memory** is the position: `{"cursor": ..., "skip": n}`, the page and how many of its events have been given.
    So it is as good as the API: a page must give the same events when it is asked for again, more only at its end.
    One that has become shorter is a `DeadLetter` of category "gap", once.

    What fails is tried again `retries` times, after `backoff` seconds, doubled each time up to a minute and drawn from
    half of it to all by `rng`, or when a Retry-After says so, up to an hour: no connection, no answer in `timeout`
    seconds, status 408, 425, 429 and 5xx, a body cut short, of another content type, of more than `max_body` bytes when
    unpacked, or not as it should be. Then `SourceError`, as with any other status at once, redirects too: a token must
    not go where nobody sent it. A next cursor that was there before is an error too: it would go in circles.

    >>> HttpPoll("file:///etc/passwd")
    Traceback (most recent call last):
        ...
    streamrec.errors.ConfigError: url must begin with http:// or https://, got 'file:///etc/passwd'
    """

    # what __del__ needs, also where __init__ raised
    _waiting: Waiting | None = None

    def __init__(
        self,
        url: str,
        *,
        decode: Callable[[bytes], Event] = decode_event,
        page: Callable[[bytes], Page] | None = None,
        cursor: str = "cursor",
        events: str = "events",
        next: str = "next",
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        follow: bool = False,
        every: float = 5.0,
        idle: float | None = None,
        timeout: float = 10.0,
        retries: int = 8,
        backoff: float = 0.5,
        max_body: int = 16 << 20,
        rng: random.Random | None = None,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(f"url must begin with http:// or https://, got {url!r}")
        for name, value in (("every", every), ("timeout", timeout), ("backoff", backoff)):
            if not value > 0:
                raise ConfigError(f"{name} must be > 0 seconds, got {value!r}")
        if retries < 0:
            raise ConfigError(f"retries must be >= 0, got {retries!r}")
        if max_body < 1:
            raise ConfigError(f"max_body must be >= 1 byte, got {max_body!r}")
        if idle is not None and not follow:
            raise ConfigError(f"idle={idle!r} is for what is followed: add follow=True")
        self.url = url
        self._decode = decode
        self._param = cursor
        self._params = dict(params or {})
        self._headers = {"Accept": "application/json", "Accept-Encoding": "gzip", **(headers or {})}
        self._follow = follow
        self._every = every
        rng = random.Random() if rng is None else rng
        reader = _Keys(events, next) if page is None else page
        self._settings = Settings(reader, timeout, retries, backoff, max_body, rng)
        self._waiting = self._wait = Waiting(idle=idle, every=min(every, _LOOK))
        self._cursor: Cursor = None
        self._skip = 0
        self._seen: deque[Cursor] = deque(maxlen=_REMEMBERED)
        self._items: Page | None = None  # the page at hand
        self._gap = False  # the page at hand has fewer events than were given
        self._told = False  # of that
        self._fetch: _Fetch | None = None
        self._due = 0.0  # when the last page may be asked for again
        self._ended = False

    def __repr__(self) -> str:
        return f"HttpPoll({self.url!r})"  # no headers: they may hold a token

    def close(self) -> None:
        """End a `read` that waits; later ones return the empty list until `seek`. A request under way is left alone."""
        if self._waiting is not None:
            self._waiting.close()
            if self._fetch is not None:
                self._fetch.stopped.set()
            self._fetch = None

    def wait(self, seconds: float) -> bool:
        """Wait until the next `read` returns at once; False where that has not come in so many seconds."""
        return self._wait.until(self._ready, seconds)

    def read(self, limit: int) -> list[Item]:
        """The next events, at most `limit`; waits for them. An empty list at the end. Raises `SourceError` where the
        service cannot be asked; the position is then that before the call."""
        if limit < 1:
            raise ConfigError(f"limit must be >= 1, got {limit!r}")
        if not self._wait.for_read(self._ready) or self._items is None:
            return []
        if self._gap:
            self._gap, self._told = False, True
            reason = f"gap: the page had {self._skip} events and now has {len(self._items.events)}"
            return [letter(self.position(), reason)]
        raws = self._items.events[self._skip : self._skip + limit]
        items = [
            read_one(self._decode, raw, {"cursor": self._cursor, "skip": self._skip + n}) for n, raw in enumerate(raws)
        ]
        self._skip += len(items)
        return items

    def position(self) -> Position:
        """`{"cursor": ..., "skip": n}`: the page, and how many of its events were given."""
        return {"cursor": self._cursor, "skip": self._skip}

    def seek(self, position: Position) -> None:
        """Go to a position. Raises `SourceError` where it is none."""
        cursor, skip = position.get("cursor", 0.5), position.get("skip")
        if not (cursor is None or type(cursor) in (str, int)) or type(skip) is not int or skip < 0:
            raise SourceError(f"no position {dict(position)!r}: seek to what position() gave")
        if self._fetch is not None:
            self._fetch.stopped.set()
        self._cursor, self._skip = cursor, skip
        self._items, self._fetch, self._due = None, None, 0.0
        self._ended = self._gap = self._told = False
        self._seen.clear()
        self._wait.open()

    # -- pages ---------------------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        """Whether there is an event, or the end; asks for the next page where there is not."""
        while True:
            page = self._items
            if page is not None:
                if self._skip < len(page.events) or self._gap:
                    return True
                if page.next is not None and page.next != self._cursor:
                    if page.next in self._seen:
                        raise SourceError(
                            f"{self.url!r} goes in circles: the page of the cursor {self._cursor!r} names "
                            f"{page.next!r} as the next, which was there before"
                        )
                    self._seen.append(self._cursor)
                    self._cursor, self._skip, self._items, self._told = page.next, 0, None, False
                    continue
                if not self._follow:
                    self._ended = True
                self._items = None
                self._due = time.monotonic() + self._every
            if self._ended:
                return True
            if self._fetch is None:
                if time.monotonic() < self._due:
                    return False
                self._fetch = _Fetch(self._request(), self._settings, self._wait.ring)
            if not self._fetch.done:
                return False
            fetch, self._fetch = self._fetch, None
            if fetch.error is not None:
                raise fetch.error
            self._items = fetch.page
            if fetch.page is not None and len(fetch.page.events) < self._skip and not self._told:
                self._gap = True

    def _request(self) -> urllib.request.Request:
        parts = urlsplit(self.url)
        params = {**self._params, **({} if self._cursor is None else {self._param: str(self._cursor)})}
        query = "&".join(part for part in (parts.query, urlencode(params)) if part)
        return urllib.request.Request(urlunsplit(parts._replace(query=query)), headers=self._headers)


class _Again(Exception):
    """It did not work out, and may the next time. `after`: the seconds that the service asks for."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _Fetch:
    """One page, asked for in a thread of its own until it is there, an error is final, or nobody wants it."""

    def __init__(self, request: urllib.request.Request, settings: Settings, ring: Callable[[], None]) -> None:
        self.done = False
        self.stopped = threading.Event()
        self.page: Page | None = None
        self.error: SourceError | None = None
        self._request = request
        self._settings = settings
        self._ring = ring
        threading.Thread(target=self._run, name="streamrec poll", daemon=True).start()

    def _run(self) -> None:
        try:
            self.page = self._tried()
        except SourceError as error:
            self.error = error
        except Exception as error:  # broad on purpose: whatever it is, the one who waits has to hear of it
            self.error = SourceError(f"cannot read {self._request.full_url!r}: {error} ({type(error).__name__})")
        self.done = True
        self._ring()

    def _tried(self) -> Page | None:
        settings, delay = self._settings, self._settings.backoff
        for left in reversed(range(settings.retries + 1)):
            try:
                return self._get()
            except _Again as error:
                if not left:
                    raise SourceError(
                        f"{self._request.full_url!r} failed {settings.retries + 1} times, at last: {error}"
                    ) from error
                pause = delay * settings.rng.uniform(0.5, 1.0) if error.after is None else error.after
                delay = min(_LONGEST, 2 * delay)
                if self.stopped.wait(pause):
                    break
        return None

    def _get(self) -> Page:
        opener = urllib.request.OpenerDirector()  # no redirects, no files, no other schemes, no errors of its own
        for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
            opener.add_handler(handler())
        deadline = time.monotonic() + self._settings.timeout
        try:
            with opener.open(self._request, timeout=self._settings.timeout) as response:
                self._judge(response)
                body = self._body(response, deadline)
        except SourceError:  # an OSError, too
            raise
        except (OSError, HTTPException) as error:
            raise _Again(f"{error or type(error).__name__}") from error
        try:
            return self._settings.page(body)
        except Exception as error:  # broad on purpose: `page` may be the user's, and the body anything
            raise _Again(f"the body is no page: {error} ({type(error).__name__})") from error

    def _judge(self, response: HTTPResponse) -> None:
        """Raises unless this is an answer with JSON in it."""
        status = response.status
        if status in _AGAIN or status > 504:
            raise _Again(f"status {status}", _retry_after(response.headers.get("Retry-After")))
        if status != 200:
            where = f" to {response.headers['Location']!r}" if "Location" in response.headers else ""
            raise SourceError(f"{self._request.full_url!r} answers with status {status} {response.reason}{where}")
        kind = response.headers.get_content_type()
        if kind != "application/json" and not kind.endswith("+json"):
            raise _Again(f"the answer is {kind}, not JSON")

    def _body(self, response: HTTPResponse, deadline: float) -> bytes:
        most = self._settings.max_body
        coding = response.headers.get("Content-Encoding", "identity").lower()
        if coding not in ("gzip", "identity"):
            raise _Again(f"the answer is coded as {coding!r}, which nobody has asked for")
        inflate = zlib.decompressobj(wbits=31) if coding == "gzip" else None
        parts: list[bytes] = []
        length = 0
        while chunk := response.read1(_CHUNK):
            if inflate is not None:
                try:
                    chunk = inflate.decompress(chunk, most + 1 - length)  # no more, whatever it says it holds
                except zlib.error as error:
                    raise _Again(f"the answer is damaged: {error}") from error
            parts.append(chunk)
            length += len(chunk)
            if length > most:
                raise _Again(f"the answer has more than max_body = {most} bytes")
            if time.monotonic() > deadline:
                raise _Again(f"no whole answer in {self._settings.timeout} seconds")
            if self.stopped.is_set():
                raise _Again("nobody waits for it any more")
        if response.length or (inflate is not None and not inflate.eof):
            raise _Again("the answer was cut short")
        return b"".join(parts)


class _Keys:
    """A body that is an object with a list of events and the next cursor under these keys."""

    def __init__(self, events: str, next: str) -> None:
        self._events = events
        self._next = next

    def __call__(self, body: bytes) -> Page:
        told = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        if self._events not in told:
            raise ValueError(f"it has no {self._events!r}, but {', '.join(told)}")
        events = msgspec.json.decode(told[self._events], type=list[msgspec.Raw])
        cursor = msgspec.json.decode(told.get(self._next, b"null"), type=Cursor)
        return Page([bytes(event) for event in events], cursor)


def _retry_after(told: str | None) -> float | None:
    """The seconds in a Retry-After, at most an hour; None where it has none."""
    if told is None:
        return None
    try:
        seconds = float(told) if told.strip().isdigit() else parsedate_to_datetime(told).timestamp() - time.time()
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 0.0), 3600.0)
