"""Who may talk to the studio: browsers of this machine, or of others with a token.

A page on the internet can make a browser send requests to 127.0.0.1. The name by which it does so, and the page it comes from,
give it away: both are checked for every request and every WebSocket, which keeps DNS rebinding and cross-site WebSockets out.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "dreamplay_token"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' ws: wss:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Even a text from a run that were taken for HTML could load nothing from elsewhere. NiceGUI builds its pages by inline scripts."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Guard:
    """ASGI middleware that turns away strangers.

    Attributes:
        hosts: names under which the studio may be asked for; empty: any, where a token is needed anyway.
        token: what a browser must show once, as `?token=...`; it then keeps it in a cookie. Empty: none is needed.
    """

    app: ASGIApp
    hosts: tuple[str, ...] = LOOPBACK
    token: str = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 403 and why."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(headers, scope["query_string"].decode("latin-1"))
        if refusal:
            return await refuse(refusal, scope, receive, send)
        return await self.app(scope, receive, self._hardened(send, shown=bool(self.token) and scope["type"] == "http"))

    def _refusal(self, headers: dict[str, str], query: str) -> str:
        """Why not, in a sentence; empty if nothing speaks against it."""
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if self.hosts and hostname(f"//{host}") not in self.hosts:
            return f"The studio is not known as {host!r} here: open it by the address that it printed when it was started."
        if origin and urlsplit(origin).netloc != host:
            return "Requests from other pages are turned away."
        if self.token and not any(same(shown, self.token) for shown in shown_tokens(headers, query)):
            return "This studio asks for a token: open the address that it printed when it was started, which ends in ?token=..."
        return ""

    def _hardened(self, send: Send, shown: bool) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = {
                    "content-security-policy": POLICY,
                    "x-content-type-options": "nosniff",
                    "referrer-policy": "no-referrer",
                    "cross-origin-resource-policy": "same-origin",
                }
                if shown:
                    extra["set-cookie"] = f"{COOKIE}={quote(self.token, safe='')}; HttpOnly; SameSite=Strict; Path=/"
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in extra.items())]
            await send(message)

        return sending


async def refuse(why: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 403 to a request, or close a WebSocket before it opens."""
    from starlette.responses import PlainTextResponse

    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": why[:120]})
        return
    await PlainTextResponse(why, 403)(scope, receive, send)


def hostname(url: str) -> str:
    """The name in an address, without its port; empty if it is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def shown_tokens(headers: dict[str, str], query: str) -> Iterable[str]:
    """What a browser shows in its address and in its cookie."""
    cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    return [*parse_qs(query).get("token", []), *([unquote(cookie.value)] if cookie else [])]


def same(one: str, other: str) -> bool:
    """Compare in a time that does not tell how much of it is right."""
    return hmac.compare_digest(one.encode(), other.encode())
