"""Every error a user can meet, and the one sentence each of them owes the user.

PrefloopError                  anything below; the command line prints it and exits with 2
├── RecipeError                the recipe (or --set) says something impossible
├── DataError                  a data file is missing, malformed, or holds nothing usable
├── ModelError                 a model or tokenizer cannot be found, loaded or used
├── GenerationError            the engine could not produce text
├── JudgeError                 a judge could not be built or failed too often
├── ApiError                   a server with OpenAI's interface cannot be reached, refuses, or is none
├── HubError                   the Hugging Face Hub cannot be reached, or does not let this through
├── TrainingError              the loss is NaN or infinite, or starts where it must not
├── LaunchError                a process of a stage could not be started, or failed
├── GuardStop                  a guard was told to stop the run, and had a reason to
└── RunFolderError             the run's folder belongs to another recipe, is damaged, or cannot be written

A message says what is wrong, where, and what to do about it, in one sentence. Errors that only a bug
can cause are assertions.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb


class PrefloopError(Exception):
    """Base of all errors that are the user's to mend."""


class RecipeError(PrefloopError, ValueError):
    """The recipe, or an override of it, cannot be used as it stands."""


class DataError(PrefloopError, ValueError):
    """Input data cannot be read or leave nothing to work on."""


class ModelError(PrefloopError, RuntimeError):
    """A model or tokenizer cannot be found, loaded or used."""


class GenerationError(PrefloopError, RuntimeError):
    """The engine could not produce text."""


class JudgeError(PrefloopError, RuntimeError):
    """A judge cannot be built, or failed on more answers than the recipe allows."""


class ApiError(PrefloopError, RuntimeError):
    """A server cannot be asked: it is away, refuses the key, lacks the model, or speaks otherwise."""


class HubError(PrefloopError, RuntimeError):
    """The Hugging Face Hub cannot be reached, does not know the token, or refuses what is sent."""


class TrainingError(PrefloopError, ArithmeticError):
    """Training produced a number that must not be trained on."""


class LaunchError(PrefloopError, RuntimeError):
    """A process that a stage was given could not be started, or failed."""


class GuardStop(PrefloopError, RuntimeError):
    """A guard measured collapse and the recipe told it to stop the run."""


class RunFolderError(PrefloopError, OSError):
    """The run's folder cannot be used: another recipe's, damaged, or not writable."""


def nearest(word: str, known: list[str]) -> str:
    """The hint that ends an error about an unknown name: the nearest spelling, else all there are."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A count with its noun: "1 pair", "1,200 pairs"; `plural` where an s does not make it."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def failure(error: BaseException) -> str:
    """What broke in a user's own code, and the line where it did."""
    frames = extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    kind = type(error).__name__
    return str(error) if isinstance(error, ImportError | SyntaxError) else f"{kind}: {error}{at}"


_GOES_ON = "then the same command goes on where it stopped"
_SYSTEM = {
    errno.ENOSPC: ("the disk of {} is full", "free some space"),
    errno.EDQUOT: ("the disk quota of {} is used up", "free some space or ask for more"),
    errno.EFBIG: ("a file in {} grew larger than is allowed here", "raise the limit (ulimit -f)"),
    errno.EIO: ("the disk of {} fails to read or write", "look into the system's log"),
    errno.ENOMEM: (
        "there is too little memory for {}",
        "close other programs or use a smaller model",
    ),
}


def system_failure(error: BaseException, place: Path | str) -> str | None:
    """What the system refused at `place`, in a sentence with a remedy; None for any other error.

    Libraries raise kinds of their own with the system's words in them, so those are looked for as well.
    """
    for one in _causes(error):
        number = one.errno if isinstance(one, OSError) else None
        for known, (what, remedy) in _SYSTEM.items():
            if number == known or (number is None and os.strerror(known) in str(one)):
                return f"{what.format(place)}; {remedy}, {_GOES_ON}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is the want of memory, in the words of Python, numpy, torch or a driver."""
    words = ("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc")
    return any(
        isinstance(one, MemoryError)
        or type(one).__name__ == "OutOfMemoryError"
        or (isinstance(one, RuntimeError | OSError) and any(word in str(one) for word in words))
        for one in _causes(error)
    )
