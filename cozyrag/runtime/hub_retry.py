"""Talking to the Hub over a network that fails: what is worth another try, and what the rest means in a sentence.

huggingface_hub retries most requests of an upload by itself, but not those that make a repository, a commit or a tag,
and not a file that answers 5xx when it is fetched; `patiently` closes that gap with tenacity. Left out: what is
asked of the Hub (push.py, pipeline.py).
"""

import errno
import os
import re
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

T = TypeVar("T")
TRIES = 6  # waits of about 1, 2, 4, 8 and 16 seconds
LONGEST_WAIT = 60.0
LONGEST_LIMIT = 360.0  # what is waited at most when the Hub names a time; its limits are per five minutes
SILENCE = 300.0  # seconds without a byte after which a request counts as lost; huggingface_hub would wait for ever
PASSING = {408, 409, 412, 425, 429}  # besides 5xx; 409 and 412: somebody else was committing
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
HUB_FAULTS = (
    HTTPError,
    OSError,
    ValueError,
)  # no connection is a bare HTTPError, a refusal an OSError, a bad name a ValueError


class Unsettled(ConnectionError):
    """A repository does not hold what was just committed to it; worth another look."""


def patiently(do: Callable[[], T], *, tries: int | None = None, info: Callable[[str], None] | None = None) -> T:
    """`do()`, done again after a while when a network fault, a 5xx or a 429 ends it; `do` must be safe to do twice.

    Raises:
        HTTPError, OSError, ValueError: what ended the last try, freed of what huggingface_hub wraps around it.
    """

    def unwrapped() -> T:
        get_session().timeout = SILENCE
        try:
            return do()
        except (RuntimeError, LocalEntryNotFoundError) as error:
            raise cause_of(error) from error

    def before_sleep(state: RetryCallState) -> None:
        if info is not None:
            info(f"{summary(state.outcome.exception())}; trying again in {state.next_action.sleep:.0f} s.")

    retrying = Retrying(
        retry=retry_if_exception(is_passing),
        stop=stop_after_attempt(tries or TRIES),
        wait=_wait,
        before_sleep=before_sleep,
        reraise=True,
    )
    return retrying(unwrapped)


def cause_of(error: BaseException) -> BaseException:
    """The network or disk fault under an error that huggingface_hub wrapped around it, or the error itself."""
    found: BaseException | None = error
    while found is not None:
        wrapped = isinstance(found, LocalEntryNotFoundError) and found.__cause__ is not None
        if isinstance(found, (HTTPError, OSError)) and not wrapped:
            return found
        found = found.__cause__
    return error


def is_passing(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING or error.response.status_code >= 500
    if isinstance(error, HTTPError):
        return True  # no answer at all: not connected, cut, timed out
    return isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, OfflineModeIsEnabled)


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: twice as long each time, or as long as the Hub asks for."""
    doubled = min(LONGEST_WAIT, 2.0 ** (state.attempt_number - 1))
    return max(doubled, min(LONGEST_LIMIT, _asked_to_wait(state.outcome.exception())))


def _asked_to_wait(error: BaseException | None) -> float:
    """Seconds that a 429 or 503 names, in `Retry-After` or in the Hub's own `RateLimit: ...;t=55`; 0 where it names none."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")) or re.search(
        r";\s*r=0;\s*t=(\d+)", headers.get("RateLimit", "")
    )
    return float(found.group(1)) if found else 0.0


def summary(error: BaseException) -> str:
    """A few words for a log line."""
    status = f" {error.response.status_code}" if isinstance(error, HfHubHTTPError) else ""
    return f"the Hub did not do its part ({type(error).__name__}{status})"


def explain(error: BaseException, repo: str, *, writing: bool) -> tuple[str, str]:
    """(what happened, what to do) for a fault that further tries did not cure; two clauses without full stops.

    Args:
        repo: the repository that was asked for. writing: whether it was to be written to.
    """
    return _explain_settings(error) or _explain_answer(error, repo, writing=writing) or _explain_rest(error, repo)


def _explain_settings(error: BaseException) -> tuple[str, str] | None:
    """What lies on this machine: no token, offline mode, a full disk."""
    if isinstance(error, LocalTokenNotFoundError):
        return (
            "no token was found on this machine",
            "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub was not asked", "unset HF_HUB_OFFLINE"
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"the disk is full ({error.strerror}{f': {error.filename}' if error.filename else ''})",
            f"make room, or set HF_HOME to a folder on another disk (now {constants.HF_HOME})",
        )
    return None


def _explain_answer(error: BaseException, repo: str, *, writing: bool) -> tuple[str, str] | None:
    """What the Hub answered."""
    if not isinstance(error, HfHubHTTPError):
        return None
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated", "ask for access on its page and log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision", "check the revision: a branch, a tag such as round-1, or a commit"
    if status == 401 and (writing or not isinstance(error, RepositoryNotFoundError)):
        source = "in HF_TOKEN" if os.environ.get("HF_TOKEN") else "of the last login"
        way = "set HF_TOKEN to a valid one or unset it" if "HF_TOKEN" in source else "run `hf auth login --force`"
        return f"the Hub does not accept the token {source}", way
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub has no {repo}, or it is private and you are not logged in",
            "check the name, or run `hf auth login`",
        )
    if status == 403:
        return (
            f"your token may not {'write to' if writing else 'read'} {repo}",
            "use a name under your own user, or a token that may" + (" write" if writing else " read it"),
        )
    if status == 429:
        return "the Hub has had too many requests from you", "wait some minutes"
    if status >= 500:
        return f"the Hub has trouble of its own (status {status})", "wait until https://status.huggingface.co is green"
    return None


def _explain_rest(error: BaseException, repo: str) -> tuple[str, str]:
    """No answer, a name that cannot be, and what nobody thought of."""
    words = " ".join(str(error).split())[:200]
    if isinstance(error, HFValidationError):
        return f"{repo!r} cannot be the name of a repository ({words})", "give it as user/name"
    if is_passing(error):
        return f"{constants.ENDPOINT} cannot be reached ({words or type(error).__name__})", "check the network"
    return f"{type(error).__name__}: {words}", "check the name, the login (`hf auth whoami`) and the network"
