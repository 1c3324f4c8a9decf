"""Upload a trained pair to the Hugging Face Hub.

Three repositories: the retriever and the index (a dataset repository) go first, one commit each; the generator's commit
goes last and carries cozyrag.json with their exact revisions, so what can be loaded is always one whole pair. Tokens
come from the places where huggingface_hub looks for them and are never written. Loading is pipeline.py's business.
"""

import json
import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError

from cozyrag.errors import InputError
from cozyrag.pipeline import PAIR_FILE, read_pair


def push_pair(
    folder: str | Path, repo_id: str, *, private: bool = False, api: HfApi | None = None, message: str = "CoZyRAG pair"
) -> str:
    """Upload what train.py left in `folder`; returns the address of the generator's repository.

    Raises:
        InputError: no finished pair in `folder`, or the Hub refuses or cannot be reached; nothing on disk is touched, and
        the message gives the command that tries again.
    """
    folder, api = Path(folder), api or HfApi()
    pair = read_pair(folder)
    pieces = {name: _files(folder / name) for name in ("retriever", "index", "generator")}
    try:
        for name, repo_type in ((f"{repo_id}-retriever", "model"), (f"{repo_id}-index", "dataset"), (repo_id, "model")):
            api.create_repo(name, repo_type=repo_type, private=private, exist_ok=True)
        retriever = _commit(api, f"{repo_id}-retriever", "model", pieces["retriever"], message)
        index = _commit(api, f"{repo_id}-index", "dataset", pieces["index"], message)
        pair["generator"] = {"folder": "."}
        pair["retriever"] = {
            "repo": f"{repo_id}-retriever",
            "revision": retriever,
            "fingerprint": pair["retriever"]["fingerprint"],
        }
        pair["index"] = {"repo": f"{repo_id}-index", "revision": index}
        switch = CommitOperationAdd(PAIR_FILE, json.dumps(pair, indent=2).encode())
        _commit(api, repo_id, "model", [*pieces["generator"], switch], message)
    except (
        HTTPError,
        OSError,
        ValueError,
    ) as error:  # no connection is a bare HTTPError, a refusal an OSError too, a bad name a ValueError
        cause = " ".join(str(error).split())[:200]
        again = f"cozyrag push {shlex.quote(str(folder))} {shlex.quote(repo_id)}{' --private' if private else ''}"
        raise InputError(
            f"The pair is complete in {folder.absolute()}, but the upload to {repo_id!r} failed ({type(error).__name__}: {cause}). "
            f"Log in with `hf auth login`, check the name and the network, then run `{again}`."
        ) from error
    return f"{api.endpoint}/{repo_id}"


def _files(folder: Path) -> list[CommitOperationAdd]:
    """Every file of a piece of the pair. Raises InputError when there is none."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if not files:
        raise InputError(
            f"Expected files to upload in {folder.absolute()}, found none, so the pair is not whole. Copy the folder anew or run train.py again."
        )
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]


def _commit(api: HfApi, repo_id: str, repo_type: str, operations: list[CommitOperationAdd], message: str) -> str:
    """One commit with all files; returns its revision."""
    return api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type).oid
