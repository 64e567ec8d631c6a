"""Messages to people: posted to any URL that takes JSON, without ever getting in the way.

A message that cannot be delivered is given up after a few attempts, and whoever sent it is told
why in a sentence. The URL of a webhook is a secret, since it is all that is needed to post in
somebody's name: what is said about it names its host alone.
"""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

LONGEST_REASON = 2000
"""Characters of a reason that are posted; the run has all of it."""

# A server that is busy or restarts may take the message later; one that refuses it will not.
_WORTH_ANOTHER_ATTEMPT = frozenset({408, 425, 429, *range(500, 600)})


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that somebody should know of.

    Attributes:
        kind: What it is, e.g. ``run_failed``.
        headline: In a few words, what happened.
        reason: Why; may be many lines, and hold anything that an error message holds.
        run_id: Dagster's run.
        job: Job of the run.
        partition: Day of the run; empty where it has none.
        link: Page of the run; empty where the address of the web UI is not known.
    """

    kind: str
    headline: str
    reason: str
    run_id: str
    job: str
    partition: str = ""
    link: str = ""

    def to_json(self) -> dict[str, str]:
        """What is posted.

        ``text`` is for chats, whose markup is escaped in it as Slack and its like want it; all else
        is plain. ``id`` is the same in every attempt to deliver the same alert.
        """
        reason = _shortened(self.reason)
        lines = [self.headline, reason, self.link]
        return {
            "id": f"{self.run_id}-{self.kind}",
            "kind": self.kind,
            "text": "\n".join(_escaped(line) for line in lines if line),
            "headline": self.headline,
            "reason": reason,
            "run_id": self.run_id,
            "job": self.job,
            "partition": self.partition,
            "link": self.link,
        }


@dataclass(frozen=True, slots=True)
class Webhook:
    """A URL that messages are posted to.

    Attributes:
        url: Where to post; a secret.
        attempts: How often a message is posted at most.
        timeout: Seconds that a server may be silent.
        pause: Seconds before the second attempt; twice as long before each further one.
        patience: Seconds after which the sender goes on, whatever the server does. Dagster lets a
            sensor handle five runs a tick, and a tick take a minute.
    """

    url: str
    attempts: int = 3
    timeout: float = 3.0
    pause: float = 0.5
    patience: float = 10.0

    def __repr__(self) -> str:
        """Without the URL."""
        return f"Webhook({self.host})"

    @property
    def host(self) -> str:
        """What may be said of the URL."""
        try:
            return urlsplit(self.url).hostname or "an unknown host"
        except ValueError:
            return "an unknown host"

    def post(self, message: Mapping[str, str]) -> str | None:
        """Deliver a message, or say why it could not be.

        Returns:
            ``None`` when it was delivered. Nothing is raised, and nothing takes longer than
            :attr:`patience`.
        """
        body = json.dumps(dict(message)).encode()
        outcome: list[str | None] = []
        given_up = threading.Event()

        # A time-out of a socket is one of silence: a server that sends a byte now and then would
        # hold the sender for ever.
        def deliver() -> None:
            outcome.append(self._deliver(body, given_up))

        thread = threading.Thread(target=deliver, name="webhook", daemon=True)
        thread.start()
        thread.join(self.patience)
        given_up.set()
        return outcome[0] if outcome else f"{self.host} took more than {self.patience:g} s"

    def _deliver(self, body: bytes, given_up: threading.Event) -> str | None:
        problem = ""
        for attempt in range(self.attempts):
            if attempt and given_up.wait(self.pause * 2 ** (attempt - 1)):
                break
            problem, again = self._attempt(body)
            if not problem:
                return None
            if not again:
                return f"{self.host} {problem}"
        return f"{self.host} {problem}, {self.attempts} times"

    def _attempt(self, body: bytes) -> tuple[str, bool]:
        """Post once: what went wrong, and whether another attempt may help."""
        try:
            request = urllib.request.Request(  # noqa: S310 - settings allow http and https
                self.url,
                data=body,
                headers={"Content-Type": "application/json", "User-Agent": "recflow"},
            )
            with _OPENER.open(request, timeout=self.timeout):
                return "", False
        except urllib.error.HTTPError as error:
            with error:
                return f"answered {error.code}", error.code in _WORTH_ANOTHER_ATTEMPT
        # Messages of these may hold the URL; their kind does not.
        except OSError as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            return f"cannot be reached ({_kind(reason)})", True
        except Exception as error:
            return f"cannot be posted to ({_kind(error)})", False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected message would arrive as a request without content, at somebody else's."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _kind(error: object) -> str:
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or type(error).__name__


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
