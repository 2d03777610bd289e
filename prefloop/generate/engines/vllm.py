"""vLLM: its options, and what can be told about them before a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx2
from pydantic import Field, model_validator

from prefloop.errors import RecipeError
from prefloop.generate.engines import EngineOptions, Setting

if TYPE_CHECKING:
    from prefloop.generate.engines._vllm_engine import VLLMEngine

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

    def open(self, setting: Setting) -> VLLMEngine:
        """Starts nothing yet: which weights to serve is told later."""
        from prefloop.generate.engines._vllm_engine import VLLMEngine

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
