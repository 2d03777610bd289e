"""What the compiled Xet client and huggingface_hub raise, told apart by their words: the stand-in speaks no Xet."""

import pytest

from prefloop.errors import HubError
from prefloop.run.hub_refusals import in_words


class XetAuthenticationError(RuntimeError):
    """By the name that hf_xet gives it."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("Data error: HTTP status client error (403 Forbidden) for url (x)"), "storage does not take"),
        (RuntimeError("Data error: HTTP status server error (502 Bad Gateway) for url (x)"), "fails at the moment"),
        (RuntimeError("error sending request for url (x)"), "connection to the Hub was lost"),
        (RuntimeError("clean_task aborted"), "could not be sent"),
        (XetAuthenticationError("no"), "does not know the token"),
        (TimeoutError("timed out"), "connection to the Hub was lost"),
        (ValueError("Malformed response from server"), "cannot be used"),
    ],
)  # fmt: skip
def test_what_has_no_response_is_told_apart_by_its_words(error: Exception, says: str) -> None:
    with pytest.raises(HubError, match=says), in_words("me/mine"):
        raise error


def test_a_bug_stays_one() -> None:
    with pytest.raises(KeyError), in_words("me/mine"):
        raise KeyError("x")
