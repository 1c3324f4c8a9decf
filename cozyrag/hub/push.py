"""Upload a trained pair to the Hugging Face Hub.

A pair takes three repositories, one commit each, and a fourth if it has a reranker. The retriever and the index (a
dataset repository) go first. The generator goes last: its commit carries cozyrag.json, which names the exact revisions
of the others, so what loads is always one whole pair. Tokens are read where huggingface_hub looks for them and are
never written. Left out: uploads during a run (background_push.py), retries and the wording of errors (hub_retry.py).
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.hf_api import RepoFile

from cozyrag.errors import InputError, PushError
from cozyrag.hub.model_cards import CARD, card_for_hub
from cozyrag.models.lora import read_adapter
from cozyrag.pair_file import CONTENTS, PAIR_FILE, check_piece, models_of, pieces_of, read_pair
from cozyrag.retrieval.index_file import check_index_contents, made_by
from cozyrag.retrieval.lance_database import is_local
from cozyrag.retrieval.opening import named_database
from cozyrag.runtime.assets import GENERATOR_FOLDER
from cozyrag.runtime.contents import CHECKSUM, sealed
from cozyrag.runtime.hub_retry import HUB_FAULTS, Unsettled, explain, is_passing, patiently

# piece of a pair -> ending of the name and type of its repository, in the order of the upload
REPOSITORIES = {
    "retriever": ("-retriever", "model"),
    "reranker": ("-reranker", "model"),
    "index": ("-index", "dataset"),
    "generator": ("", "model"),
}
PUBLIC = {
    "retriever": "the retriever with its card",
    "reranker": "the reranker with its card",
    "index": "the full text of all passages with their vectors",
    "generator": "the generator with its card",
}
ADDRESS = "the address of the database with the passages"  # in place of their text
# in the order in which they are named
HOLDS = {
    "generator": "generator; the name that loads the pair",
    "retriever": "retriever",
    "reranker": "reranker",
    "index": "passages",
}
PRIVATE = "For private repositories, push to other names with --private (--hub_private when training)."
SHOWN = 8  # names of files
TAG = "cozyrag"  # in the card of every repository of a pair
READ = {".safetensors", ".json", ".jsonl", ".txt", ".model", ".jinja", ".parquet", ".faiss", ".bin", ".pt", ".pkl"}
# The files of a pair, whatever folder of it they are in; no other file is uploaded.
ALLOWED = (
    "README.md", "training.png", "LICENSE", "LICENSE.txt", "LICENSE.md",
    "config.json", "generation_config.json", "*model*.safetensors", "*model*.safetensors.index.json",
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja", "chat_template.json",
    "modules.json", "config_sentence_transformers.json", "sentence_*config.json", "router_config.json",
    "preprocessor_config.json", "processor_config.json", "whitespacetokenizer_config.json",
    "index.json", "index.faiss", "passages.parquet", "vectors.safetensors", "lists.safetensors",
)  # fmt: skip
Info = Callable[[str], None]
Files = Mapping[str, Path | bytes]  # by the path in the repository


def push_pair(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    info: Info | None = None,
    kept: Path | None = None,
    again: str | None = None,
) -> str:
    """Upload the pair in `folder`; returns the addresses of its repositories in a phrase, the generator's first.

    Args:
        tag: name of this state on the Hub; an existing tag moves. info: takes lines: what becomes public, before
            anything is uploaded, files that stay here, and each retry.
        kept, again: folder and command that an error names; None: this folder, `cozyrag push` with these arguments.

    Raises:
        InputError: there is no finished pair in `folder`. PushError: the Hub refuses or cannot be reached; nothing on
            disk has changed, and the message gives the command that completes the upload.
    """
    folder = Path(folder)
    pair = read_pair(folder)
    pieces = _pieces(folder, pair, info)
    _check_base(folder)
    database = named_database(folder / "index")
    if database and is_local(database):
        raise InputError(f"{_unreachable(database)} and push again.")
    message = f"CoZyRAG pair, {tag}" if tag else "CoZyRAG pair"
    kept, again = kept or folder, again or push_command(folder, repo_id, private=private, tag=tag)
    try:
        repositories = _claim_all(repo_id, pieces_of(pair), private, info, database=database)
        repo_id = repositories["generator"].name
        files: dict[str, Files] = {
            role: paths | {CARD: card_for_hub(paths.get(CARD), role, repo_id).encode()}
            for role, paths in pieces.items()
        }
        made = {role: repositories[role].publish(files[role], message) for role in files if role != "generator"}
        on_hub = _on_hub(pair, {role: each.name for role, each in repositories.items()}, made)
        last = {
            **files["generator"],
            PAIR_FILE: json.dumps(sealed(on_hub) if CHECKSUM in pair else on_hub, indent=2).encode(),
        }
        made["generator"] = repositories["generator"].publish(last, message)
    except HUB_FAULTS as error:
        raise PushError(f"The pair is complete in {kept.absolute()}, but {_failed(error, repo_id, again)}") from error
    addresses = _addresses(repositories)
    try:
        for role, revision in made.items() if tag else ():
            repositories[role].tag(str(tag), revision)
    except HUB_FAULTS as error:
        what, remedy = explain(error, repo_id, writing=True)
        raise PushError(
            f"The pair is uploaded to {addresses}, but not all of it has the tag {tag!r}: {what}. To set the tag, "
            f"{remedy}, then run `{again}`."
        ) from error
    return addresses


def _addresses(repositories: Mapping[str, "_Repository"]) -> str:
    """The addresses of a pair in a phrase."""
    *first, last = [f"{repositories[role].address} ({words})" for role, words in HOLDS.items() if role in repositories]
    return f"{', '.join(first)} and {last}"


def _failed(error: BaseException, repo_id: str, again: str) -> str:
    """The cause of a failed upload and its remedy."""
    if isinstance(error, InputError):
        return f"it was not pushed. {error} Then run `{again}`."
    what, remedy = explain(error, repo_id, writing=True)
    return f"the upload to {repo_id!r} failed: {what}. To finish it, {remedy}, then run `{again}`."


def push_command(folder: Path, repo_id: str, *, private: bool, tag: str | None) -> str:
    """The command line of this upload."""
    words = ["cozyrag", "push", str(folder), repo_id, *(["--private"] if private else [])]
    return shlex.join(words + (["--tag", tag] if tag else []))


def refusal(
    repo_id: str,
    *,
    reranker: bool = False,
    private: bool = False,
    database: str | None = None,
    info: Info | None = None,
) -> str | None:
    """Create the repositories before a run; returns why the pair cannot be pushed, or None.

    A Hub that cannot be reached now is no refusal: it may be back when the upload begins.

    Args:
        reranker: whether the pair will have one. database: which its index will name, if any.
    """
    if database and is_local(database):
        return f"--push_to_hub: {_unreachable(database)}, or omit --push_to_hub. Nothing was trained."
    roles = [role for role in REPOSITORIES if reranker or role != "reranker"]
    try:
        _claim_all(repo_id, roles, private, info, tries=2, database=database)
    except InputError as error:
        return f"--push_to_hub: {error} Nothing was trained."
    except HUB_FAULTS as error:
        what, remedy = explain(error, repo_id, writing=True)
        if not is_passing(error):
            return f"--push_to_hub: {what}. Nothing was trained; {remedy}, then start again."
        if info is not None:
            info(f"Note: {what}. The run starts all the same and tries to push later.")
    return None


# ---- the files


def _check_base(folder: Path) -> None:
    """Raise InputError for an adapter whose base model nobody else can load."""
    adapter = read_adapter(str(folder / "generator"))
    if adapter and Path(adapter.base).is_dir() and Path(adapter.base) != GENERATOR_FOLDER:
        raise InputError(
            f"The generator is a LoRA adapter of a model in the local folder {adapter.base}, which nobody else can "
            f"load. Run `{shlex.join(('cozyrag', 'merge', str(folder), f'{folder}-merged'))}` and push that folder."
        )


def _unreachable(database: str) -> str:
    """The beginning of a refusal of a pair whose database nobody else can open."""
    return (
        f"The passages are in a database in the local folder {database}, which nobody else can open. Make an index in "
        "files (`cozyrag index` with a folder as --output), or in a database with an address such as s3://"
    )


def _pieces(folder: Path, pair: dict, info: Info | None) -> dict[str, dict[str, Path]]:
    """The files of each piece by their path in its repository. Raises InputError for missing or mixed pieces."""
    pieces: dict[str, dict[str, Path]] = {}
    other: list[str] = []
    for role in (each for each in REPOSITORIES if each in pair):
        pieces[role], strange = piece_files(folder, role)
        other += strange
        if not pieces[role]:
            raise InputError(
                f"Expected files to upload in {(folder / role).absolute()}, found none, so the pair is incomplete. "
                "Copy the folder again or train again."
            )
    if other and info is not None:
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        info(f"Not uploaded, as no files of a pair: {', '.join(other[:SHOWN])}{more}.")
    named, made = pair["retriever"]["fingerprint"], made_by(folder / "index")
    if named != made:
        raise InputError(
            f"Expected the index of retriever {named} in {folder.absolute() / 'index'}, found that of {made}: saving "
            "was interrupted or a piece was replaced, and a mixed pair is not pushed. Train with --resume, or copy "
            "the folder again."
        )
    check_index_contents(folder / "index", whole=True)
    for role in models_of(pair):
        check_piece(folder / role, pair[role], whole=True)
    return pieces


def piece_files(folder: Path, role: str) -> tuple[dict[str, Path], list[str]]:
    """The files of a piece by their path in it, and the paths in `folder` of what else is there.

    Raises InputError for a link in the place of a file.
    """
    files, other = {}, []
    for path in sorted(path for path in (folder / role).rglob("*") if path.is_symlink() or not path.is_dir()):
        if _belongs(path, folder):
            files[path.relative_to(folder / role).as_posix()] = path
        else:
            other.append(path.relative_to(folder).as_posix())
    return files, other


def _belongs(path: Path, folder: Path) -> bool:
    """Whether a file below the folder of a pair is one of its files.

    Raises InputError for a link in its place: what it points to may be private.
    """
    inside = path.relative_to(folder).parts
    if any(part.startswith(".") for part in inside) or not any(fnmatchcase(path.name, each) for each in ALLOWED):
        return False
    below = [folder.joinpath(*inside[: count + 1]) for count in range(len(inside))]
    if link := next((each for each in below if each.is_symlink()), None):
        raise InputError(
            f"Expected files in {folder.absolute()}, found the link {link.relative_to(folder)} to {link.readlink()}. "
            "Nothing was uploaded, because a link may lead to something private. Replace it by a copy of the file."
        )
    return path.is_file()


def _on_hub(pair: dict, names: Mapping[str, str], made: Mapping[str, str]) -> dict:
    """The content of cozyrag.json in the generator's repository."""
    named = {
        role: {"repo": names[role], "revision": revision}
        | {key: pair[role][key] for key in ("fingerprint", CONTENTS) if key in pair[role]}
        for role, revision in made.items()
    }
    return pair | {"generator": pair["generator"] | {"folder": "."}} | named


# ---- the repositories


@dataclass(frozen=True)
class _Repository:
    """A repository on the Hub. `kind`: "model" or "dataset"; `info` takes a line for each retry. `private`: known
    once it is claimed.
    """

    name: str
    kind: str
    api: HfApi
    info: Info | None
    private: bool = False

    @property
    def address(self) -> str:
        """Where people see it."""
        return f"{self.api.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def claim(self, private: bool, tries: int | None) -> "_Repository":
        """Create the repository if it does not exist; returns it under its full name.

        Raises:
            InputError: it exists and holds something else, or it is public but must be private.
        """

        def create() -> str:
            return self.api.create_repo(self.name, repo_type=self.kind, private=private or None, exist_ok=True).repo_id

        name = patiently(create, tries=tries, info=self.info)
        look = self.api.dataset_info if self.kind == "dataset" else self.api.model_info
        found = patiently(lambda: look(name), tries=tries, info=self.info)
        held = [each.rfilename for each in found.siblings or () if PurePosixPath(each.rfilename).suffix in READ]
        if held and TAG not in (found.tags or ()):
            raise InputError(
                f"The name {name!r} is taken: that {self.kind} repository holds {held[0]!r}, and its card has no tag "
                f"{TAG!r}, so nothing in it was changed. Choose another name."
            )
        if private and not found.private:
            raise InputError(
                f"{name!r} already exists and is public, but must be private; nothing was uploaded. Make it private in "
                f"its settings on {self.api.endpoint}, or choose another name."
            )
        return replace(self, name=name, private=bool(found.private))

    def publish(self, files: Files, message: str) -> str:
        """Make the repository hold these files with at most one commit; returns the revision that lists exactly them.

        It compares, commits the differences on top of the revision it saw, and compares again. A commit whose reply was
        lost is found instead of repeated, a commit of somebody else in between is noticed, and a repository that is up
        to date keeps its revision.
        """

        def attempt() -> str:
            revision = str(self.api.repo_info(self.name, repo_type=self.kind).sha)
            differences = self.differences(revision, files)
            if not differences:
                return revision
            made = self.api.create_commit(
                self.name, differences, commit_message=message, repo_type=self.kind, parent_commit=revision
            ).oid
            if self.differences(made, files):
                raise Unsettled(f"{self.name} does not list what was committed to it")
            return made

        return patiently(attempt, info=self.info)

    def differences(self, revision: str, files: Files) -> list[CommitOperationAdd | CommitOperationDelete]:
        """What a commit on top of `revision` must change. Files of types that no loader reads stay."""
        listed = self.api.list_repo_tree(self.name, recursive=True, revision=revision, repo_type=self.kind)
        there = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        stale = [path for path in there if path not in files and PurePosixPath(path).suffix in READ]
        changed = [path for path, source in files.items() if path not in there or not _same(source, there[path])]
        deleted = [CommitOperationDelete(path) for path in stale]
        return [*deleted, *(CommitOperationAdd(path, files[path]) for path in changed)]

    def tag(self, tag: str, revision: str) -> None:
        """Give a revision a tag; an existing one moves."""

        def attempt() -> None:
            refs = self.api.list_repo_refs(self.name, repo_type=self.kind)
            tags = {each.name: each.target_commit for each in refs.tags}
            if tags.get(tag) == revision:
                return
            if tag in tags:
                self.api.delete_tag(self.name, tag=tag, repo_type=self.kind)
            try:
                self.api.create_tag(self.name, tag=tag, revision=revision, repo_type=self.kind)
            except HfHubHTTPError as error:  # an earlier request got through, but its reply did not
                if error.response.status_code != 409:
                    raise
                raise Unsettled(f"tag {tag} of {self.name}") from error

        patiently(attempt, info=self.info)


def _claim_all(
    repo_id: str,
    pieces: Collection[str],
    private: bool,
    info: Info | None,
    *,
    tries: int | None = None,
    database: str | None = None,
) -> dict[str, _Repository]:
    """The repositories of a pair by piece. Says what will be public, before anything is uploaded.

    Raises InputError as `_Repository.claim`, HTTPError, OSError.
    """
    api = HfApi()
    if get_token() is None:
        raise LocalTokenNotFoundError("no token")
    unclaimed = {role: _Repository(repo_id + end, kind, api, info) for role, (end, kind) in REPOSITORIES.items()}
    claimed = {role: each.claim(private, tries) for role, each in unclaimed.items() if role in pieces}
    texts = PUBLIC | ({"index": ADDRESS} if database else {})
    public = [f"{texts[role]} ({each.address})" for role, each in claimed.items() if not each.private]
    if public and info is not None:
        info(f"Anyone can read what is uploaded: {', '.join(public)}. {PRIVATE}")
    return claimed


def _same(source: Path | bytes, there: RepoFile) -> bool:
    """Whether a file on the Hub has this content: by SHA-256 for large files, by git's blob hash for small ones."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if there.size != size:
        return False
    if there.lfs is not None:
        return _digest(source, hashlib.sha256()) == there.lfs.sha256
    return _digest(source, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)) == there.blob_id


def _digest(source: Path | bytes, digest: "hashlib._Hash") -> str:
    """Hex digits of `digest` after all bytes of `source`; a file is read in chunks."""
    if isinstance(source, bytes):
        digest.update(source)
    else:
        with source.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
