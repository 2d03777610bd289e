"""What the Hugging Face Hub, its storage or the way there refuses, in one sentence each with its remedy.

A lost connection is called one only where it is one: a token, a missing repository, a limit or a broken server
have other remedies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefloop.errors import HubError, PrefloopError

NO_TOKEN = "there is no token of the Hub here; hf auth login, or set HF_TOKEN"
_UNKNOWN_TOKEN = "the Hub does not know the token; hf auth login with a valid one, or set HF_TOKEN"
_GOES_ON = "the same command goes on where it stopped"
_CONNECTIONS = {"httpx", "httpcore", "httpx2", "httpcore2"}
# The Xet client is compiled and raises RuntimeError alone; its words are those of the Rust client that it calls.
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")
_XET_CONNECTION = re.compile(
    r"error sending request|connection (refused|reset|closed)|timed out|dns error", re.IGNORECASE
)


@contextmanager
def in_words(repo_id: str) -> Iterator[None]:
    """Turn what is raised while `repo_id` is made or sent into a HubError; what only a bug can cause passes."""
    try:
        yield
    except PrefloopError:
        raise
    except Exception as error:
        if (sentence := _sentence(error, repo_id)) is None:
            raise
        raise HubError(sentence) from error


def _sentence(error: BaseException, repo_id: str) -> str | None:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    chain = list(_with_causes(error))
    if any(isinstance(one, LocalTokenNotFoundError) for one in chain):
        return NO_TOKEN
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return "HF_HUB_OFFLINE keeps libraries off the Hub; unset it, then push again"
    if any(type(one).__name__ == "XetAuthenticationError" for one in chain):
        return _UNKNOWN_TOKEN
    for one in chain:
        if (status := _status(one)) is not None:
            return _refusal(repo_id, status, one)
    if isinstance(error, ValueError) and "metadata" in str(error):
        return (
            f"the Hub does not accept the header of {repo_id}'s card ({_one_line(error)}); correct README.md in "
            "the run's folder policy"
        )
    if lost := next((one for one in chain if _is_of_the_connection(one)), None):
        said = _one_line(lost)
        return f"the connection to the Hub was lost while {repo_id} was sent ({said}); {_GOES_ON}"
    if isinstance(error, ValueError):
        # What the client says of an answer that is none, or that names files it refuses.
        return f"the Hub's answer about {repo_id} cannot be used ({_one_line(error)}); try again, or update huggingface_hub"
    if isinstance(error, RuntimeError):
        return f"{repo_id} could not be sent ({_one_line(chain[-1])}); {_GOES_ON}"
    return None


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Uploads wrap what they met in a RuntimeError, and say it as its cause."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error tells of."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    found = _XET_STATUS.search(str(error)) if isinstance(error, RuntimeError) else None
    return int(found[1]) if found else None


def _is_of_the_connection(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, RuntimeError) and _XET_CONNECTION.search(str(error)):
        return True
    return type(error).__module__.partition(".")[0] in _CONNECTIONS


def _refusal(repo_id: str, status: int, error: BaseException) -> str:
    said = " ".join(str(getattr(error, "server_message", None) or f"status {status}").split())
    if status == 401:
        return _UNKNOWN_TOKEN
    if status == 403:
        return _no_right(repo_id, error)
    if status == 404:
        return (
            f"the Hub has no {repo_id}, or hides it from this token ({said}); look at its page, at the token's rights "
            "and at HF_ENDPOINT, then push again"
        )
    if status in (409, 412):
        return f"{repo_id} is being changed by someone else ({said}); {_GOES_ON}"
    if status == 429:
        return (
            f"the Hub takes no more requests for now ({said}); wait {_wait(error)}, then {_GOES_ON}"
        )
    if status == 408 or status >= 500:
        return f"the Hub fails at the moment ({said}); try later: {_GOES_ON}"
    return f"the Hub refuses {repo_id} ({said}); correct that, then push again"


def _no_right(repo_id: str, error: BaseException) -> str:
    if isinstance(error, RuntimeError) or _method(error) == "PUT":
        # Of Xet or of an upload's address: what the Hub signed for a time is good no longer; no token goes there.
        return f"the Hub's storage does not take the upload of {repo_id} any more; {_GOES_ON}"
    owner = repo_id.partition("/")[0]
    return f"the token may not write to {owner} on the Hub; take one with the role write, or a name of your own"


def _method(error: Any) -> str:
    request = getattr(getattr(error, "response", None), "request", None)
    return str(getattr(request, "method", ""))


def _wait(error: Any) -> str:
    """How long, as the Hub says it: `Retry-After: 30`, or `RateLimit: "api";r=0;t=30`."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    found = re.fullmatch(r"\d+", headers.get("retry-after", "").strip()) or re.search(
        r"(?<=\bt=)\d+", headers.get("ratelimit", "")
    )
    return f"{found[0]} s" if found else "some minutes"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
