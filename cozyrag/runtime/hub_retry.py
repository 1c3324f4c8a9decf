"""Retries of Hub requests over an unreliable network, and the other Hub errors as a sentence with a remedy.

huggingface_hub retries most requests of an upload, but not those that create a repository, a commit or a tag, and not a
download that answers 5xx; `patiently` retries these with tenacity. Left out: the requests themselves (push.py,
pipeline.py).
"""

import os
import re
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import constants, errors
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from cozyrag.runtime.atomic_files import NO_SPACE

T = TypeVar("T")
TRIES = 6  # waits of about 1, 2, 4, 8 and 16 seconds
LONGEST_WAIT = 60.0
LONGEST_LIMIT = 360.0  # longest wait that the Hub may ask for; its rate limits are per five minutes
SILENCE = 300.0  # seconds without a byte after which a request counts as lost; huggingface_hub would wait for ever
PASSING = {408, 409, 412, 425, 429}  # besides 5xx; 409 and 412: somebody else was committing
# No connection is a bare HTTPError, a refusal an OSError, an invalid name a ValueError.
HUB_FAULTS = (HTTPError, OSError, ValueError)


class Unsettled(ConnectionError):
    """A repository does not yet hold what was just committed to it; the check is worth repeating."""


def patiently(function: Callable[[], T], *, tries: int | None = None, info: Callable[[str], None] | None = None) -> T:
    """Call `function`, again after a network fault, a 5xx or a 429; repeated calls must be safe.

    Raises:
        HTTPError, OSError, ValueError: the error of the last try, without what huggingface_hub wraps around it.
    """

    def unwrapped() -> T:
        get_session().timeout = SILENCE
        try:
            return function()
        except (RuntimeError, LocalEntryNotFoundError) as error:
            raise _cause_of(error) from error

    def before_sleep(state: RetryCallState) -> None:
        error, wait = _error_of(state), state.next_action.sleep if state.next_action else 0
        status = f" {error.response.status_code}" if isinstance(error, HfHubHTTPError) else ""
        if info is not None:
            info(f"A request to the Hub failed ({type(error).__name__}{status}); trying again in {wait:.0f} s.")

    retrying = Retrying(
        retry=retry_if_exception(is_passing),
        stop=stop_after_attempt(tries or TRIES),
        wait=_wait,
        before_sleep=before_sleep,
        reraise=True,
    )
    return retrying(unwrapped)


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _cause_of(error: BaseException) -> BaseException:
    """The network or disk fault that huggingface_hub wrapped in `error`, or `error` itself."""
    found: BaseException | None = error
    while found is not None:
        wrapped = isinstance(found, LocalEntryNotFoundError) and found.__cause__ is not None
        if isinstance(found, (HTTPError, OSError)) and not wrapped:
            return found
        found = found.__cause__
    return error


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING or error.response.status_code >= 500
    if isinstance(error, HTTPError):
        return True  # no answer: not connected, cut off, timed out
    return isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, OfflineModeIsEnabled)


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: twice as long each time, or as long as the Hub asks for."""
    doubled = min(LONGEST_WAIT, 2.0 ** (state.attempt_number - 1))
    return max(doubled, min(LONGEST_LIMIT, _asked_to_wait(_error_of(state))))


def _asked_to_wait(error: BaseException | None) -> float:
    """Seconds that a 429 or 503 names, in `Retry-After` or in the Hub's own `RateLimit: ...;t=55`; 0 for none."""
    headers = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", ""))
    found = found or re.search(r";\s*r=0;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(found[1]) if found else 0.0


def explain(error: BaseException, repo: str, *, writing: bool) -> tuple[str, str]:
    """(what happened, what to do) for an error that further tries did not cure; two clauses without full stops.

    Args:
        repo: the requested repository. writing: whether the request was to write to it.
    """
    return _explain_settings(error) or _explain_answer(error, repo, writing=writing) or _explain_rest(error, repo)


def _explain_settings(error: BaseException) -> tuple[str, str] | None:
    """Causes on this machine: no token, offline mode, a full disk."""
    if isinstance(error, errors.LocalTokenNotFoundError):
        remedy = "log in with `hf auth login`, or set HF_TOKEN to a token with write permission"
        return "no token was found on this machine", remedy
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so no request was sent", "unset HF_HUB_OFFLINE"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        place = f": {error.filename}" if error.filename else ""
        remedy = f"free some space, or set HF_HOME to a folder on another disk (now {constants.HF_HOME})"
        return f"the disk is full ({error.strerror}{place})", remedy
    return None


def _explain_answer(error: BaseException, repo: str, *, writing: bool) -> tuple[str, str] | None:
    """Errors that the Hub answered with."""
    if not isinstance(error, HfHubHTTPError):
        return None
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated", "ask for access on its page and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision", "check the revision: a branch, a tag such as round-1, or a commit"
    if status == 401 and (writing or not isinstance(error, errors.RepositoryNotFoundError)):
        if os.environ.get("HF_TOKEN"):
            return "the Hub does not accept the token in HF_TOKEN", "set HF_TOKEN to a valid one or unset it"
        return "the Hub does not accept the token of the last login", "run `hf auth login --force`"
    if isinstance(error, errors.RepositoryNotFoundError):
        cause = f"the Hub has no {repo}, or it is private and you are not logged in"
        return cause, "check the name, or run `hf auth login`"
    if status == 403:
        access = "write to" if writing else "read"
        return f"your token may not {access} {repo}", f"use a name under your own user, or a token that may {access} it"
    if status == 429:
        return "the Hub has received too many requests from you", "wait some minutes"
    if status >= 500:
        return (
            f"the Hub reports an internal error (status {status})",
            "wait until https://status.huggingface.co is green",
        )
    return None


def _explain_rest(error: BaseException, repo: str) -> tuple[str, str]:
    """No answer, an invalid name, and all other errors."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not a valid name of a repository ({text})", "give it as user/name"
    if is_passing(error):
        return f"{constants.ENDPOINT} cannot be reached ({text or type(error).__name__})", "check the network"
    return f"{type(error).__name__}: {text}", "check the name, the login (`hf auth whoami`) and the network"
