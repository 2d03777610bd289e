"""A stand-in of the Hugging Face Hub: as much of its HTTP interface as huggingface_hub's client calls to push."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_valid"
USER = "me"


@dataclass
class Repository:
    """One repository's files after its last commit."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


class Hub:
    """The server and what it holds; `cut_off` uploads break in their middle, and requests are refused by `refuses`."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.cut_off = 0
        self.refuses: dict[str, int] = {}
        """A part of a request's path -> the status that it gets."""
        self.headers: dict[str, str] = {}
        """Of refusals."""
        hub = self

        class Handler(_Handler):
            def __init__(self, *args: Any) -> None:
                self.hub = hub
                super().__init__(*args)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, name: str, kind: str = "models") -> dict[str, bytes]:
        """What a repository holds."""
        return self.repositories[kind, name].files


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._body()
        if self._refused():
            return
        _, kind, name = self.path.strip("/").removesuffix("/revision/main").split("/", 2)
        there = self.hub.repositories.get((kind, name))
        if there is None:
            return self._answer(404, {"error": "Repository not found"})
        facts = {"_id": "0", "id": name, "private": there.private, "sha": "0" * 40, "siblings": []}
        return self._answer(200, {**facts, "tags": [], "downloads": 0, "likes": 0})

    def do_PUT(self) -> None:
        body = self._body()
        oid = self.path.rpartition("/")[2]
        self.hub.puts.append(oid)
        if self._refused():
            return
        if self.hub.cut_off:
            self.hub.cut_off -= 1
            self.close_connection = True
            self.connection.close()
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.contents[oid] = body
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self._refused():
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"warnings": [], "errors": []})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        _, kind, rest = self.path.strip("/").split("/", 2)
        name, verb, _ = rest.rsplit("/", 2)
        there = self.hub.repositories[kind, name]
        if verb == "preupload":
            return self._preupload(there, json.loads(body))
        assert verb == "commit"
        return self._commit(there, name, [json.loads(line) for line in body.splitlines()])

    def _refused(self) -> bool:
        for part, status in self.hub.refuses.items():
            if part in self.path:
                self._answer(status, {"error": "the Hub is being mended"}, self.hub.headers)
                return True
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked["organization"] or USER
        if owner != USER:
            message = f"You don't have the rights to create a model under the namespace {owner!r}"
            return self._answer(403, {"error": message})
        kind, name = f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}"
        if (kind, name) in self.hub.repositories:
            return self._answer(409, {"error": "You already created this repo"})
        self.hub.repositories[kind, name] = Repository(asked["visibility"] == "private")
        prefix = "" if kind == "models" else f"{kind}/"
        return self._answer(200, {"url": f"{self.hub.endpoint}/{prefix}{name}"})

    def _preupload(self, there: Repository, asked: dict[str, Any]) -> None:
        answers = []
        for file in asked["files"]:
            large = file["path"].endswith(".safetensors")
            old = there.files.get(file["path"])
            oid = None
            if old is not None:
                blob = hashlib.sha1(b"blob %d\0" % len(old) + old).hexdigest()
                oid = hashlib.sha256(old).hexdigest() if large else blob
            mode = "lfs" if large else "regular"
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self._answer(200, {"files": answers})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            upload = {"href": f"{self.hub.endpoint}/content/{one['oid']}"}
            known = one["oid"] in self.hub.contents
            objects.append({**one, **({} if known else {"actions": {"upload": upload}})})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, there: Repository, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                there.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                there.files[value["path"]] = self.hub.contents[value["oid"]]
        there.commits += 1
        oid = f"{there.commits:040x}"
        url = f"{self.hub.endpoint}/{name}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(
        self, status: int, value: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True
