"""Every error a user can meet, and the one sentence each of them owes the user.

PrefloopError                  anything below; the command line prints it and exits with 2
├── RecipeError                the recipe (or --set) says something impossible
├── DataError                  a data file is missing, malformed, or holds nothing usable
├── ModelError                 a model or tokenizer cannot be found, loaded or used
├── GenerationError            the engine could not produce text
├── JudgeError                 a judge could not be built or failed too often
├── ApiError                   a server with OpenAI's interface cannot be reached, refuses, or is none
├── TrainingError              the loss is NaN or infinite, or starts where it must not
├── LaunchError                a process of a stage could not be started, or failed
├── GuardStop                  a guard was told to stop the run, and had a reason to
└── RunFolderError             the run's folder belongs to another recipe, is damaged, or cannot be written

A message says what is wrong, where, and what to do about it, in one sentence. Errors that only a bug
can cause are assertions.
"""

from __future__ import annotations

from difflib import get_close_matches


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
