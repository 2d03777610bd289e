"""A program with the command line and the part of the HTTP interface of `vllm serve` that prefloop uses.

A token's log-prob is a function of (weights, token before, token), where the weights are the bytes of the
files that it was given, so stale weights show. STAND_IN in the environment makes it misbehave.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

VOCABULARY = 258


def fingerprint(*folders: str | Path) -> bytes:
    """Of the weights in these folders."""
    digest = blake2b(digest_size=8)
    for folder in folders:
        for file in sorted(Path(folder).glob("*.safetensors")):
            digest.update(file.read_bytes())
    return digest.digest()


def logprobs(weights: bytes, before: int) -> list[float]:
    """Of every token, after the one before."""
    draw = random.Random(weights + before.to_bytes(4, "big"))
    scores = [draw.random() * 3 for _ in range(VOCABULARY)]
    total = math.log(math.fsum(map(math.exp, scores)))
    return [score - total for score in scores]


class State:
    """What a server of either kind knows."""

    daemon_threads = True
    request_queue_size = 64

    def remember(self, options: argparse.Namespace, mood: str) -> None:
        self.options, self.mood = options, mood
        self.adapters: dict[str, bytes] = {}
        self.base = fingerprint(options.model)

    def weights(self, model: str) -> bytes | None:
        if model == self.options.served_model_name:
            return self.base
        return self.adapters.get(model)

    def complete(self, body: dict[str, Any], weights: bytes) -> dict[str, Any]:
        ids = body["prompt"]
        draw = random.Random(body.get("seed"))
        sampled, chosen = [], []
        for _ in range(body["max_tokens"]):
            row = logprobs(weights, [*ids, *sampled][-1])
            token = draw.choices(range(VOCABULARY), list(map(math.exp, row)))[0]
            sampled.append(token)
            chosen.append(row[token])
            if token in body.get("stop_token_ids", ()):
                break
        choice: dict[str, Any] = {"token_ids": sampled, "stop_reason": None}
        choice["logprobs"] = {"token_logprobs": chosen}
        row = logprobs(weights, ids[-1])
        if wanted := body.get("logprob_token_ids"):
            choice["logprobs"]["top_logprobs"] = [{f"token_id:{t}": row[t] for t in wanted}]
        if (top := body.get("prompt_logprobs")) is not None:
            choice["prompt_logprobs"] = [None]
            for before, token in pairwise(ids):
                row = logprobs(weights, before)
                likeliest = sorted(range(VOCABULARY), key=lambda t: -row[t])[:top]
                known = {t: {"logprob": row[t], "rank": n} for n, t in enumerate(likeliest, 1)}
                choice["prompt_logprobs"].append({token: {"logprob": row[token]}, **known})
        return {"choices": [choice], "usage": {"completion_tokens": len(sampled)}}


class SocketServer(State, ThreadingMixIn, UnixStreamServer):
    pass


class PortServer(State, ThreadingHTTPServer):
    pass


class Handler(BaseHTTPRequestHandler):
    server: SocketServer | PortServer

    def address_string(self) -> str:
        return "socket"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            name = self.server.options.served_model_name
            cards = [{"id": name, "parent": None}]
            cards += [{"id": a, "parent": name} for a in self.server.adapters]
            return self.reply(200, {"data": cards})
        return self.reply(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        if self.path == "/v1/load_lora_adapter":
            if body["lora_name"] in server.adapters:
                return self.reply(400, {"error": {"message": "has already been loaded"}})
            if not Path(body["lora_path"], "adapter_config.json").exists():
                return self.reply(404, {"error": {"message": f"no adapter {body['lora_path']}"}})
            found = fingerprint(server.options.model, body["lora_path"])
            # Stale: whatever comes after the first one is the first one.
            first = next(iter(server.adapters.values()), found)
            server.adapters[body["lora_name"]] = first if server.mood == "stale" else found
            return self.reply(200, "Success")
        if self.path == "/v1/unload_lora_adapter":
            if server.mood != "stale":
                del server.adapters[body["lora_name"]]
            return self.reply(200, "Success")
        weights = server.weights(body["model"])
        if weights is None:
            return self.reply(404, {"error": {"message": f"no model {body['model']}"}})
        if len(body["prompt"]) + body["max_tokens"] > 2048:
            return self.reply(400, {"error": {"message": "maximum context length is 2048 tokens."}})
        if server.mood == "slow":
            time.sleep(60)
        return self.reply(200, server.complete(body, weights))

    def reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve")
    parser.add_argument("model")
    parser.add_argument("--uds")
    parser.add_argument("--served-model-name", required=True)
    options, rest = parser.parse_known_args()
    mood = os.environ.get("STAND_IN", "")
    print("arguments:", *rest, flush=True)
    if mood == "broken":
        sys.exit("ValueError: no kernel for this machine.")
    # vLLM's engine is a process of its own as well.
    core = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"processes: {os.getpid()} {core.pid}", flush=True)
    if options.uds:
        server: SocketServer | PortServer = SocketServer(options.uds, Handler)
    else:
        server = PortServer(("127.0.0.1", 0), Handler)
        print(f"port: {server.server_address[1]}", flush=True)
    server.remember(options, mood)
    server.serve_forever()


if __name__ == "__main__":
    main()
