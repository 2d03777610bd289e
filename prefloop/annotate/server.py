"""The local server of the annotation page: three files and three calls, for people who have the link.

The link's fragment, which browsers never send, holds a secret token; each call sends it in a header, so that
no other page and no other user of the machine can read answers or vote. The Host header must be this machine's
own name or address: a foreign name that resolves to it (DNS rebinding) is refused. The page loads from this
server only, and runs no other script.
"""

from __future__ import annotations

import errno
import hmac
import json
import secrets
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from prefloop.annotate.service import AnnotationService, Answer
from prefloop.errors import DataError, PrefloopError
from prefloop.records import Record

LOOPBACK = "127.0.0.1"
_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/annotate.css": ("annotate.css", "text/css; charset=utf-8"),
    "/annotate.js": ("annotate.js", "text/javascript; charset=utf-8"),
}
_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_MAX_BODY_BYTES = 2**16
_SECONDS_PER_REQUEST = 30


class _Join(Record):
    name: str


class _Vote(Record):
    name: str
    item: str
    answer: Answer
    reason: str | None = None
    seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class _Undo(Record):
    name: str
    item: str


class Refused(Exception):
    """A refused request: HTTP status and error message."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class AnnotationServer(ThreadingHTTPServer):
    """Serves one annotation until it is shut down."""

    daemon_threads = True
    # A thread that waits for a browser must not keep the command from ending.
    block_on_close = False

    def __init__(self, service: AnnotationService, host: str = LOOPBACK, port: int = 0) -> None:
        """Bind; port 0 takes a free one. Raises PrefloopError where binding fails."""
        self.service = service
        self.token = secrets.token_urlsafe(24)
        self.host = host
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise PrefloopError(
                f"cannot listen on {host}, port {port} ({error.strerror}); "
                + (
                    "name another --port, or 0 for a free one"
                    if taken
                    else "name another --host or --port"
                )
            ) from error

    def server_bind(self) -> None:
        """Bind without the base class's look-up of the host's full name, which queries the network."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore closed connections; anything else is a bug, and its traceback is shown."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def link(self) -> str:
        """The URL for annotators; it has the machine's own name where all addresses are bound."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/#{self.token}"

    def is_own_host(self, host: str | None) -> bool:
        """Whether a Host header names this machine. The port may differ: SSH can forward from another."""
        name = _host_name(f"//{host}") if host else None
        if name is None:
            return False
        if is_loopback(self.host):
            return is_loopback(name)
        # DNS rebinding uses the attacker's host name, never an address.
        own = (self.host.lower(), socket.gethostname().lower())
        return is_loopback(name) or _is_address(name) or name in own


def is_loopback(host: str) -> bool:
    """Whether an address or name can be reached from this machine only."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


class Handler(BaseHTTPRequestHandler):
    """Handles one request."""

    server: AnnotationServer
    timeout = _SECONDS_PER_REQUEST
    server_version, sys_version = "prefloop", ""

    def log_message(self, *_: object) -> None:
        """Log nothing: the terminal shows who joined and who is done."""

    def do_GET(self) -> None:
        """Send one of the page's files."""
        if not self.server.is_own_host(self.headers["Host"]):
            self._refuse(_wrong_host(self.headers["Host"]))
        elif self.path in _FILES:
            name, kind = _FILES[self.path]
            self._send(HTTPStatus.OK, (_PAGE / name).read_bytes(), kind)
        elif self.path == "/favicon.ico":
            self._send(HTTPStatus.NO_CONTENT, b"", "image/x-icon")
        else:
            self._refuse(Refused(HTTPStatus.NOT_FOUND, "there is nothing here"))

    def do_POST(self) -> None:
        """Handle a call; the response is the annotator's state, or {"error": message}."""
        try:
            state = self._call(self._checked_body())
        except Refused as refused:
            self._refuse(refused)
        except DataError as error:
            self._refuse(Refused(HTTPStatus.BAD_REQUEST, str(error)))
        except OSError as error:
            sentence = f"the vote could not be written ({error.strerror}); it does not count yet"
            self._refuse(Refused(HTTPStatus.INSUFFICIENT_STORAGE, sentence))
        else:
            self._send_json(HTTPStatus.OK, state)

    def _call(self, body: bytes) -> dict[str, Any]:
        service = self.server.service
        try:
            if self.path == "/api/join":
                return service.join(_Join.model_validate_json(body).name)
            if self.path == "/api/undo":
                undo = _Undo.model_validate_json(body)
                return service.undo(undo.name, undo.item)
            if self.path == "/api/vote":
                vote = _Vote.model_validate_json(body)
                return service.vote(vote.name, vote.item, vote.answer, vote.reason, vote.seconds)
        except ValidationError as error:
            sentence = f"the page sent what this server does not know ({error.errors()[0]['msg']})"
            raise Refused(HTTPStatus.BAD_REQUEST, sentence) from error
        raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _checked_body(self) -> bytes:
        """The body of a call, after checking host, origin, token, type and length. Raises Refused."""
        host, origin = self.headers["Host"], self.headers["Origin"]
        if not self.server.is_own_host(host):
            raise _wrong_host(host)
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise Refused(HTTPStatus.FORBIDDEN, "another site's page may not vote here")
        token = self.headers["X-Prefloop-Token"] or ""
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(
                HTTPStatus.FORBIDDEN,
                "this link is not of this session; open the one that prefloop annotate printed last",
            )
        if self.headers["Content-Type"] != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be application/json")
        length = self.headers["Content-Length"] or ""
        if not length.isdecimal() or int(length) > _MAX_BODY_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the body is too long")
        return self.rfile.read(int(length))

    def _refuse(self, refused: Refused) -> None:
        self._send_json(refused.status, {"error": str(refused)})

    def _send_json(self, status: HTTPStatus, value: object) -> None:
        # As ASCII, so that lone surrogates can be encoded too.
        self._send(status, json.dumps(value).encode("ascii"), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _wrong_host(host: str | None) -> Refused:
    return Refused(
        HTTPStatus.MISDIRECTED_REQUEST,
        f"this server is not {host!r}; open the link that prefloop annotate printed",
    )
