"""Upload a trained pair to the Hugging Face Hub.

Three repositories: the retriever and the index (a dataset repository) go first, one commit each; the generator's commit
goes last and carries cozyrag.json with their exact revisions, so what can be loaded is always one whole pair. Tokens
come from the places where huggingface_hub looks for them and are never written. Left out: pushing while a run goes on
(background_push.py), the words of the errors and the patience (hub_retry.py), loading (pipeline.py).
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.hf_api import RepoFile

from cozyrag.errors import InputError, PushError
from cozyrag.hub.model_cards import CARD, card_for_hub
from cozyrag.models.lora import read_adapter
from cozyrag.pair_file import PAIR_FILE, read_pair
from cozyrag.retrieval.passage_index import made_by
from cozyrag.runtime.assets import GENERATOR_FOLDER
from cozyrag.runtime.hub_retry import HUB_FAULTS, Unsettled, explain, is_passing, patiently

TAG = "cozyrag"  # stands in the card of every repository of a pair
READ = {".safetensors", ".json", ".jsonl", ".txt", ".model", ".jinja", ".parquet", ".faiss", ".bin", ".pt", ".pkl"}
Say = Callable[[str], None]


def repositories(repo_id: str) -> dict[str, tuple[str, str]]:
    """(name, type) of the repository of each piece, in the order of the upload."""
    return {
        "retriever": (f"{repo_id}-retriever", "model"),
        "index": (f"{repo_id}-index", "dataset"),
        "generator": (repo_id, "model"),
    }


def push_pair(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    api: HfApi | None = None,
    message: str = "CoZyRAG pair",
    info: Say | None = None,
    kept: Path | None = None,
    again: str | None = None,
) -> str:
    """Upload what train.py left in `folder`; returns the address of the generator's repository.

    Args:
        tag: name of this state on the Hub, moved here if there was one. say: takes a line about every wait.
        kept, again: the folder and the command that an error names; None: this folder, `cozyrag push` with these arguments.

    Raises:
        InputError: no finished pair in `folder`. PushError: the Hub refuses or cannot be reached; nothing on disk is
        touched, and the message gives the command that finishes the upload.
    """
    folder, api = Path(folder), api or HfApi()
    pair, pieces = read_pair(folder), _pieces(folder)
    _check_base(folder)
    where = repositories(repo_id)
    try:
        claimed = _claim_all(api, where, private, info)
        repo_id = claimed["generator"]
        for role, files in pieces.items():
            files[CARD] = card_for_hub(files.get(CARD), role, repo_id).encode()
        made = {
            role: _publish(api, claimed[role], where[role][1], pieces[role], message, info)
            for role in ("retriever", "index")
        }
        switch = json.dumps(_on_hub(pair, claimed, made), indent=2).encode()
        made["generator"] = _publish(api, repo_id, "model", pieces["generator"] | {PAIR_FILE: switch}, message, info)
        for role, revision in made.items() if tag else ():
            _tag(api, claimed[role], where[role][1], tag, revision, info)
    except HUB_FAULTS as error:
        kept, again = kept or folder, again or push_command(folder, repo_id, private=private, tag=tag)
        raise PushError(f"The pair is complete in {kept.absolute()}, but {_failed(error, repo_id, again)}") from error
    return f"{api.endpoint}/{repo_id}"


def _failed(error: BaseException, repo_id: str, again: str) -> str:
    """What went wrong with an upload, and how to finish it."""
    if isinstance(error, InputError):
        return f"it was not pushed. {error} Then run `{again}`."
    what, remedy = explain(error, repo_id, writing=True)
    return f"the upload to {repo_id!r} failed: {what}. To finish it, {remedy}, then run `{again}`."


def push_command(folder: Path, repo_id: str, *, private: bool, tag: str | None) -> str:
    """The command line that does the same again."""
    words = ["cozyrag", "push", str(folder), repo_id, *(["--private"] if private else [])]
    return shlex.join(words + (["--tag", tag] if tag else []))


def refusal(repo_id: str, *, private: bool = False, api: HfApi | None = None, info: Say | None = None) -> str | None:
    """Why the Hub would not take a pair under that name, seen by making its repositories; None where it would.

    A Hub that cannot be reached now is no reason, since it may be back when the upload begins.
    """
    try:
        _claim_all(api or HfApi(), repositories(repo_id), private, info, tries=2)
    except InputError as error:
        return f"--push_to_hub: {error} Nothing was trained."
    except HUB_FAULTS as error:
        what, remedy = explain(error, repo_id, writing=True)
        if not is_passing(error):
            return f"--push_to_hub: {what}. Nothing was trained; {remedy}, then start again."
        if info is not None:
            info(f"Note: {what}. The run goes on, and tries to push when there is something to push.")
    return None


# ---- what goes up


def _check_base(folder: Path) -> None:
    """Refuse an adapter whose model nobody else has. Raises InputError."""
    adapter = read_adapter(str(folder / "generator"))
    if adapter and Path(adapter.base).is_dir() and Path(adapter.base) != GENERATOR_FOLDER:
        raise InputError(
            f"The generator is a LoRA adapter of a model in the local folder {adapter.base}, which nobody else could load. Give `cozyrag merge {folder} "
            f"{folder}-merged` and push that folder."
        )


def _pieces(folder: Path) -> dict[str, dict[str, Path | bytes]]:
    """The files of each piece by their path in its repository. Raises InputError when the pieces are not of one pair."""
    pieces = {role: _files(folder / role) for role in repositories("")}
    named, made = read_pair(folder)["retriever"]["fingerprint"], made_by(folder / "index")
    if named != made:
        raise InputError(
            f"Expected the index of retriever {named} in {folder.absolute() / 'index'}, found that of {made}: saving was cut short, or a "
            "piece was exchanged, and a mixed pair is not pushed. Run train.py --resume, or copy the folder anew."
        )
    return pieces


def _files(folder: Path) -> dict[str, Path | bytes]:
    """Every file of a piece of the pair. Raises InputError when there is none."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files:
        raise InputError(
            f"Expected files to upload in {folder.absolute()}, found none, so the pair is not whole. Copy the folder anew or run train.py again."
        )
    return files


def _on_hub(pair: dict, names: Mapping[str, str], made: Mapping[str, str]) -> dict:
    """cozyrag.json as it stands in the generator's repository."""
    named = {role: {"repo": names[role], "revision": made[role]} for role in ("retriever", "index")}
    named["retriever"]["fingerprint"] = pair["retriever"]["fingerprint"]
    return pair | {"generator": pair["generator"] | {"folder": "."}} | named


# ---- the repositories


def _claim_all(
    api: HfApi, where: Mapping[str, tuple[str, str]], private: bool, info: Say | None, *, tries: int | None = None
) -> dict[str, str]:
    """Full names of the repositories, made where they are missing.

    Raises:
        InputError: one is there and holds something else, or is public and shall be private. HTTPError, OSError.
    """
    if api.token is False or (api.token in (None, True) and get_token() is None):
        raise LocalTokenNotFoundError("no token")
    claimed = {}
    for role, (name, repo_type) in where.items():
        claimed[role] = _claim(api, name, repo_type, private, info, tries)
    return claimed


def _claim(api: HfApi, name: str, repo_type: str, private: bool, info: Say | None, tries: int | None) -> str:
    def made() -> str:
        return api.create_repo(name, repo_type=repo_type, private=private or None, exist_ok=True).repo_id

    name = patiently(made, tries=tries, info=info)
    info = patiently(lambda: api.repo_info(name, repo_type=repo_type), tries=tries, info=info)
    held = [each.rfilename for each in info.siblings or () if PurePosixPath(each.rfilename).suffix in READ]
    if held and TAG not in (info.tags or ()):
        raise InputError(
            f"The name {name!r} is taken: that {repo_type} repository holds {held[0]!r} and its card does not say it is a CoZyRAG one, "
            "so nothing there was touched. Choose another name."
        )
    if private and not info.private:
        raise InputError(
            f"{name!r} is there already and public, but shall be private; nothing was uploaded. Make it private in its settings on "
            f"{api.endpoint}, or choose another name."
        )
    return name


def _publish(
    api: HfApi, name: str, repo_type: str, files: Mapping[str, Path | bytes], message: str, info: Say | None
) -> str:
    """Make a repository hold these files by at most one commit; gives the revision at which the Hub lists exactly them.

    It looks, commits what differs on top of what it saw, and looks again. So a commit whose answer was lost is found and
    not made twice, one that came in between is seen, and a repository that holds it all already keeps its revision.
    """

    def attempt() -> str:
        revision = api.repo_info(name, repo_type=repo_type).sha
        differences = _differences(api, name, repo_type, revision, files)
        if not differences:
            return revision
        made = api.create_commit(
            name, differences, commit_message=message, repo_type=repo_type, parent_commit=revision
        ).oid
        if _differences(api, name, repo_type, made, files):
            raise Unsettled(f"{name} does not list what was committed to it")
        return made

    return patiently(attempt, info=info)


def _differences(
    api: HfApi, name: str, repo_type: str, revision: str, files: Mapping[str, Path | bytes]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What a commit on top of `revision` has to do; files of other kinds than those that loaders read are left alone."""
    listed = api.list_repo_tree(name, recursive=True, revision=revision, repo_type=repo_type)
    there = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
    stale = [path for path in there if path not in files and PurePosixPath(path).suffix in READ]
    changed = [path for path, source in files.items() if path not in there or not _same(source, there[path])]
    return [CommitOperationDelete(path) for path in stale] + [CommitOperationAdd(path, files[path]) for path in changed]


def _same(source: Path | bytes, there: RepoFile) -> bool:
    """Whether a file on the Hub has this content: by SHA-256 for large ones, as git names its blobs for small ones."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if there.size != size:
        return False
    if there.lfs is not None:
        return _digest(source, hashlib.sha256()) == there.lfs.sha256
    return _digest(source, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)) == there.blob_id


def _digest(source: Path | bytes, digest) -> str:
    """Hex digits of `digest` after all bytes of `source`, read piece by piece."""
    if isinstance(source, bytes):
        digest.update(source)
        return digest.hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def _tag(api: HfApi, name: str, repo_type: str, tag: str, revision: str, info: Say | None) -> None:
    """Give a revision a name, taking it from the one that had it."""

    def attempt() -> None:
        tags = {each.name: each.target_commit for each in api.list_repo_refs(name, repo_type=repo_type).tags}
        if tags.get(tag) == revision:
            return
        if tag in tags:
            api.delete_tag(name, tag=tag, repo_type=repo_type)
        try:
            api.create_tag(name, tag=tag, revision=revision, repo_type=repo_type)
        except HfHubHTTPError as error:  # an earlier try got through and its answer did not
            if error.response.status_code != 409:
                raise
            raise Unsettled(f"tag {tag} of {name}") from error

    patiently(attempt, info=info)
