"""Messages to a real server of this machine, which answers, refuses, hangs or drips."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from recflow.adapters.webhook import LONGEST_REASON, Alert, Webhook

SECRET = "s3cret-token"
ALERT = Alert(
    kind="run_failed",
    headline="retrain of 2026-01-05 failed",
    reason='<!channel> "ünïcode" & 日本語\nsecond line',
    run_id="abc",
    job="retrain",
    partition="2026-01-05",
    link="http://localhost:3000/runs/abc",
)


@dataclass
class Receiver:
    """What a server got, and what it answers: a status for each request, the last for all more."""

    answers: list[int]
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    url: str = ""

    def webhook(self, **options: float) -> Webhook:
        return Webhook(f"{self.url}/hooks/{SECRET}?key={SECRET}", **{"pause": 0.05, **options})  # type: ignore[arg-type]


@contextmanager
def serving(answers: list[int]) -> Iterator[Receiver]:
    receiver = Receiver(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.times.append(time.monotonic())
            receiver.headers.append(dict(self.headers))
            receiver.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            answer = answers[min(len(receiver.bodies), len(answers)) - 1]
            self.send_response(answer)
            if 300 <= answer < 400:
                self.send_header("Location", f"{receiver.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def speaking(answer: Callable[[socket.socket, threading.Event], None]) -> Iterator[Webhook]:
    """A server that does to each connection what ``answer`` does."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    if over.is_set():
                        return
                    with suppress(OSError):
                        answer(connection, over)

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        try:
            yield Webhook(f"http://127.0.0.1:{port}/{SECRET}", pause=0.05)
        finally:
            over.set()
            # Accepting ends with one more connection.
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            thread.join()


def test_the_message_arrives_whole_and_escaped() -> None:
    with serving([200]) as receiver:
        assert receiver.webhook().post(ALERT.to_json()) is None
    (body,) = receiver.bodies
    assert receiver.headers[0]["Content-Type"] == "application/json"
    assert body.isascii()
    assert json.loads(body) == {
        "id": "abc-run_failed",
        "kind": "run_failed",
        "text": "retrain of 2026-01-05 failed\n"
        '&lt;!channel&gt; "ünïcode" &amp; 日本語\nsecond line\n'
        "http://localhost:3000/runs/abc",
        "headline": "retrain of 2026-01-05 failed",
        "reason": '<!channel> "ünïcode" & 日本語\nsecond line',
        "run_id": "abc",
        "job": "retrain",
        "partition": "2026-01-05",
        "link": "http://localhost:3000/runs/abc",
    }


def test_a_message_without_link_has_no_empty_line() -> None:
    alert = Alert("checks_failed", "a", "b", "abc", "monitor")
    assert alert.to_json()["text"] == "a\nb"


@pytest.mark.parametrize(("length", "posted"), [(LONGEST_REASON, "x"), (LONGEST_REASON + 1, "…")])
def test_long_reasons_are_cut(length: int, posted: str) -> None:
    alert = Alert("run_failed", "a", "x" * length, "abc", "retrain")
    reason = alert.to_json()["reason"]
    assert len(reason) == LONGEST_REASON
    assert reason[-1] == posted


def test_a_server_that_is_busy_is_asked_again_each_time_later() -> None:
    with serving([500, 503, 200]) as receiver:
        assert receiver.webhook(pause=0.1).post(ALERT.to_json()) is None
    assert len(receiver.bodies) == 3
    assert len(set(receiver.bodies)) == 1
    first, second, third = receiver.times
    assert second - first >= 0.1
    assert third - second >= 0.2


def test_it_is_not_asked_for_ever() -> None:
    with serving([500]) as receiver:
        problem = receiver.webhook().post(ALERT.to_json())
    assert problem == "127.0.0.1 answered 500, 3 times"
    assert len(receiver.bodies) == 3


@pytest.mark.parametrize("answer", [302, 400, 403, 404, 410])
def test_a_server_that_refuses_is_asked_once_and_followed_nowhere(answer: int) -> None:
    with serving([answer]) as receiver:
        problem = receiver.webhook().post(ALERT.to_json())
    assert problem == f"127.0.0.1 answered {answer}"
    assert len(receiver.bodies) == 1


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    problem = Webhook(f"http://127.0.0.1:{port}/{SECRET}", pause=0.01).post(ALERT.to_json())
    assert problem == "127.0.0.1 cannot be reached (Connection refused), 3 times"


def test_a_server_that_hangs_is_given_up() -> None:
    def hang(connection: socket.socket, over: threading.Event) -> None:
        over.wait(30)

    with speaking(hang) as webhook:
        started = time.monotonic()
        quick = Webhook(webhook.url, attempts=2, timeout=0.2, pause=0.05)
        problem = quick.post(ALERT.to_json())
        assert time.monotonic() - started < 5
    assert problem is not None
    assert problem.startswith("127.0.0.1 cannot be reached (")
    assert "time" in problem.lower()


def test_a_server_that_drips_does_not_hold_the_sender() -> None:
    def drip(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while not over.wait(0.05):
            connection.sendall(b"X")

    with speaking(drip) as webhook:
        started = time.monotonic()
        problem = Webhook(webhook.url, timeout=30, patience=0.5).post(ALERT.to_json())
        took = time.monotonic() - started
    assert problem == "127.0.0.1 took more than 0.5 s"
    assert 0.5 <= took < 5


def test_a_server_that_speaks_no_http_is_given_up() -> None:
    def babble(connection: socket.socket, over: threading.Event) -> None:
        connection.recv(65536)
        connection.sendall(b"\x00\x01 nonsense\r\n\r\n")

    with speaking(babble) as webhook:
        problem = webhook.post(ALERT.to_json())
    assert problem == "127.0.0.1 cannot be posted to (BadStatusLine)"


@pytest.mark.parametrize(
    "url",
    [
        f"http://127.0.0.1:1/{SECRET} with spaces",
        f"http://127.0.0.1:none/{SECRET}",
        f"http://{SECRET}@127.0.0.1:1/",
        f"nonsense-{SECRET}",
        f"http://[{SECRET}/",
    ],
)
def test_nothing_said_holds_the_secret_and_nothing_is_raised(url: str) -> None:
    webhook = Webhook(url, pause=0.01)
    problem = webhook.post(ALERT.to_json())
    assert problem
    assert SECRET not in problem
    assert SECRET not in repr(webhook)
    assert SECRET not in str(webhook)
