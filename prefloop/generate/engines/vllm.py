"""vLLM: its options, and what can be told about them before a run."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

import httpx2
from pydantic import Field, model_validator

from prefloop.errors import GenerationError, RecipeError
from prefloop.generate.completion import completion_ids, sampled_response, scored_answer
from prefloop.generate.engine import EngineContext, EngineOptions, Probe, Weights
from prefloop.generate.vllm_server import Body, Refusal, Server
from prefloop.generate.weight_check import mismatch, probe
from prefloop.machine import Bar
from prefloop.records import Request, Response, Sampling, Scored, derive_seed

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for (`--max-lora-rank`)."""

_HAS_VLLM = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"


class VLLM(EngineOptions):
    """A vLLM server: started and ended by the run, or one that runs already."""

    python: str | None = None
    """Python of the environment that has vLLM, which may be another than prefloop's; null: the same."""
    url: str | None = Field(default=None, pattern=r"^https?://[^/\s]+$")
    """Address of a server that runs already, such as http://10.0.0.2:8000; null starts one."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that share one copy of the weights."""
    data_parallel: int = Field(default=1, ge=1)
    """Copies of the weights that share the prompts."""
    gpu_memory: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of each GPU's memory that vLLM takes. Lower it where the policy is trained on the same GPU."""
    stay: bool = True
    """Keep the server while the policy trains; false ends it before and starts it after, for want of memory."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Answers written at a time."""
    eager: bool = False
    """Neither compile nor record CUDA graphs: sooner started, slower afterwards."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `vllm serve`, such as ["--max-model-len", "4096"]."""
    start_timeout: float = Field(default=900.0, gt=0.0)
    """Seconds that the server may take to start."""
    answer_timeout: float = Field(default=1800.0, gt=0.0)
    """Seconds that one answer may take."""

    @model_validator(mode="after")
    def _a_running_server_is_as_it_is(self) -> VLLM:
        ours = self.model_fields_set - {"url", "max_num_seqs", "answer_timeout"}
        if self.url is not None and (changed := [f for f in sorted(ours) if self._differs(f)]):
            raise ValueError(
                f"engine.url names a server that runs already, which engine.{changed[0]} cannot "
                "change; set it where that server is started, or leave out url"
            )
        return self

    def _differs(self, field: str) -> bool:
        return bool(getattr(self, field) != type(self).model_fields[field].default)

    def check(self, *, tuning: str, lora_rank: int) -> None:
        """Whether vLLM is there, or the server answers and can take what this run trains."""
        if tuning == "lora" and lora_rank > RANKS[-1]:
            raise RecipeError(
                f"model.lora.r is {lora_rank}, and vLLM serves adapters up to rank {RANKS[-1]}; lower it"
            )
        if self.url is None:
            self._check_python()
        elif tuning == "full":
            raise RecipeError(
                "model.tuning full makes a new model each round, which a server that runs already "
                "cannot take; leave out engine.url, or set model.tuning to lora"
            )
        else:
            base_model(self.url)

    def open(self, setting: EngineContext) -> VLLMEngine:
        """Starts nothing yet: which weights to serve is told later. RecipeError for what vLLM cannot serve."""
        if setting.lora_others:
            raise RecipeError(
                f"the adapter changes {', '.join(setting.lora_others)}, and vLLM serves adapters of linear "
                "modules only; leave out the section engine to generate in process, or name linear "
                "modules in model.lora.target_modules"
            )
        return VLLMEngine(self, setting)

    @property
    def executable(self) -> str:
        """The Python that runs vLLM."""
        return self.python or sys.executable

    def _check_python(self) -> None:
        if shutil.which(self.executable) is None:
            raise RecipeError(
                f"engine.python: no program {self.executable}; name the python of an environment "
                "with vLLM"
            )
        found = subprocess.run([self.executable, "-c", _HAS_VLLM], check=False, capture_output=True)
        if found.returncode:
            raise RecipeError(
                f"{self.executable} has no package vllm; install it there, or name the python of an "
                "environment that has it in engine.python (docs/engines.md)"
            )


def base_model(url: str) -> str:
    """The name of the model that a running server serves without adapter. RecipeError where there is none."""
    try:
        answer = httpx2.get(f"{url}/v1/models", timeout=10.0)
        answer.raise_for_status()
        cards = answer.json()["data"]
        return next(str(card["id"]) for card in cards if not card.get("parent"))
    except (httpx2.HTTPError, ValueError, LookupError, TypeError, StopIteration) as error:
        raise RecipeError(
            f"engine.url {url} does not answer as a vLLM server does "
            f"({str(error) or type(error).__name__}); start it, or correct the address"
        ) from error


_BASE = "policy"

_COMPLETIONS = "/v1/completions"

_UNCHANGED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What no request leaves to the server: one that runs already may take its model's generation_config."""


class VLLMEngine:
    """An OutsideEngine over one server."""

    def __init__(self, options: VLLM, setting: EngineContext) -> None:
        """Starts nothing: `load_weights` does."""
        self._options = options
        self._setting = setting
        self._chat = setting.chat
        self._server = Server(
            options.url,
            setting.log,
            # Twice as many as are written at a time, so that the next ones wait inside vLLM.
            concurrency=2 * options.max_num_seqs,
            timeout=options.answer_timeout,
        )
        self._served: Weights | None = None
        self._base = _BASE
        self._name = _BASE
        self._before: list[float] | None = None
        """The trainer's log-probs of the probe for the weights served so far."""
        # A server that runs already may know adapters of other runs.
        self._token = uuid4().hex[:8]
        self._adapters = 0

    # Weights.

    def load_weights(self, weights: Weights, probe_of_trainer: Probe) -> None:
        """Start the server, or exchange the weights, where it has not these already; then probe it."""
        if weights == self._served:
            return
        old, self._served = self._served, None
        if self._options.url is not None:
            self._base = base_model(self._options.url)
        elif old is None or old.model != weights.model:
            self._server.start(self._command(weights), self._options.start_timeout)
        last, self._name = self._name, self._base
        if weights.adapter is not None:
            self._adapters += 1
            # A fresh name: what vLLM keeps by name (weights, prefixes) is never an earlier round's.
            self._name = f"prefloop-{self._token}-{self._adapters}"
            self._load(self._name, weights)
        if old is not None and old.model == weights.model:
            self._unload(last)
        self._demand_weights(weights, [*probe_of_trainer()])
        self._served = weights

    def offload(self) -> None:
        """End the server, where the recipe says so; `load_weights` starts it again."""
        if not self._options.stay:
            self.close()

    def close(self) -> None:
        """End the server that was started here; leave another one as it was found."""
        served, self._served = self._served, None
        if self._options.url is not None and served is not None:
            # Whatever it says: the run is over.
            with suppress(GenerationError):
                self._unload(self._name)
        self._server.stop()

    def _command(self, weights: Weights) -> list[str]:
        options, setting = self._options, self._setting
        given: dict[str, Any] = {
            "served-model-name": _BASE,
            "dtype": setting.dtype,
            # The model's own defaults (a temperature, a penalty) are nobody's wish here.
            "generation-config": "vllm",
            "tensor-parallel-size": options.tensor_parallel,
            "data-parallel-size": options.data_parallel,
            "gpu-memory-utilization": options.gpu_memory,
            "max-num-seqs": options.max_num_seqs,
        }
        if setting.lora_rank is not None:
            rank = next(rank for rank in RANKS if rank >= setting.lora_rank)
            given |= {"max-lora-rank": rank, "max-loras": 1}
        flags = {
            "enable-prefix-caching": True,
            "enable-lora": setting.lora_rank is not None,
            "enforce-eager": options.eager,
            "trust-remote-code": setting.trust_remote_code,
        }
        return [
            *(options.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(weights.model)),
            *(f"--{name}={value}" for name, value in given.items()),
            # Without this vLLM 0.32 adapts the head too, and fails when asked for log-probs of a prompt.
            *(["--lora-target-modules", *setting.lora_modules] if setting.lora_modules else []),
            *(f"--{name}" for name, wanted in flags.items() if wanted),
            *options.arguments,
        ]

    def _load(self, name: str, weights: Weights) -> None:
        body = {"lora_name": name, "lora_path": str(weights.adapter)}
        try:
            self._server.ask("/v1/load_lora_adapter", body)
        except Refusal as refusal:
            raise GenerationError(
                f"vLLM will not load the adapter {weights.adapter} ({refusal}); a server that runs "
                "already must see this folder, and be started with --enable-lora, --max-lora-rank and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            ) from refusal

    def _unload(self, name: str) -> None:
        if name != self._base:
            # One that was started anew meanwhile does not know it.
            with suppress(Refusal):
                self._server.ask("/v1/unload_lora_adapter", {"lora_name": name})

    def _demand_weights(self, weights: Weights, trainer: list[float]) -> None:
        wrong = mismatch(probe(self), trainer, self._before, self._setting.dtype)
        if wrong is not None:
            raise GenerationError(
                f"vLLM does not answer with the weights in {weights.adapter or weights.model}: {wrong}; "
                "let it serve the recipe's model in the policy's dtype, or leave out the section engine"
            )
        self._before = trainer

    # What an engine is asked for.

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """One response per request, in their order."""
        options = sampling.model_dump(mode="json")
        common = {
            "max_tokens": options.pop("max_new_tokens"),
            **options,
            "logprobs": 0,
            # What ends an answer is the trainer's to say, not the model's configuration.
            "ignore_eos": True,
            "stop_token_ids": sorted(self._chat.stop_ids),
        }
        bodies = [
            {**common, "prompt": self._prompt(request), "seed": derive_seed(seed, place)}
            for place, request in enumerate(requests)
        ]
        choices = self._complete(bodies, label)
        return [
            sampled_response(
                self._chat,
                request,
                sampling,
                choice["token_ids"],
                choice["logprobs"]["token_logprobs"],
            )
            for choice, request in zip(choices, requests, strict=True)
        ]

    def score(
        self,
        requests: Sequence[Request],
        answers: Sequence[Response],
        *,
        top: int = 0,
        at: Sequence[Collection[int]] | None = None,
    ) -> list[Scored]:
        """Log-probability of each given answer, wherever it is asked for: the server scores whole prompts."""
        rows = [
            completion_ids(self._chat, request, answer)
            for request, answer in zip(requests, answers, strict=True)
        ]
        bodies = [
            {
                "prompt": self._prompt(request) + ids,
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": top,
            }
            for request, ids in zip(requests, rows, strict=True)
            if ids
        ]
        choices = iter(self._complete(bodies, "score"))
        found = [next(choices)["prompt_logprobs"][-len(ids) :] if ids else [] for ids in rows]
        return [
            self._scored(entries, ids, answer, top)
            for entries, ids, answer in zip(found, rows, answers, strict=True)
        ]

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Probability of each option as the next token."""
        firsts = [self._chat.option_ids(r.messages, options, r.prefix) for r in requests]
        bodies = [
            {
                "prompt": self._chat.prompt_ids(request.messages, request.prefix, at_answer=True),
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": len(ids),
                "logprob_token_ids": ids,
                "return_tokens_as_token_ids": True,
            }
            for request, ids in zip(requests, firsts, strict=True)
        ]
        rows = []
        for choice, ids in zip(self._complete(bodies, "choose"), firsts, strict=True):
            found = choice["logprobs"]["top_logprobs"][0]
            rows.append(tuple(math.exp(found[f"token_id:{token}"]) for token in ids))
        return rows

    def _complete(self, bodies: Sequence[Body], label: str) -> list[Any]:
        """The one choice of each completion."""
        named = [
            {"model": self._name, "return_token_ids": True, **_UNCHANGED, **body} for body in bodies
        ]
        with Bar(label, len(named)) as bar:

            def count(answer: Any) -> None:
                bar.advance(items=1, amount=answer["usage"]["completion_tokens"])

            try:
                answers = self._server.ask_all(_COMPLETIONS, named, count)
            except Refusal as refusal:
                raise GenerationError(
                    f"vLLM refuses a request ({refusal}); lower data.max_prompt_tokens or "
                    "method.sampling.max_new_tokens if it is too long"
                ) from refusal
        return [answer["choices"][0] for answer in answers]

    def _prompt(self, request: Request) -> list[int]:
        return self._chat.prompt_ids(request.messages, request.prefix)

    def _scored(self, rows: Sequence[Any], ids: list[int], answer: Response, top: int) -> Scored:
        """`rows`: for each token of the answer, by token id, what vLLM says of it and of the likeliest ones."""
        known = [
            {int(token): float(entry["logprob"]) for token, entry in row.items()} for row in rows
        ]
        likeliest = [sorted(row.items(), key=lambda one: -one[1])[:top] for row in known if top]
        return scored_answer(
            self._chat,
            answer,
            ids,
            [row[token] for row, token in zip(known, ids, strict=True)],
            [[token for token, _ in row] for row in likeliest],
            [[logprob for _, logprob in row] for row in likeliest],
        )
