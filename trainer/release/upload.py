"""A published folder -> a repository on the Hub, in one commit that is all or nothing, and private until verified.

The token comes from the Hub's own login or HF_TOKEN and is never written, printed or passed on.
"""

import time
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from trainer.core.errors import UserError, shorten
from trainer.core.files import sha256_file
from trainer.model.hub import HUB_ERRORS

OWN_OF_THE_HUB = {".gitattributes"}  # the Hub writes it into every repository
# refusals by the Hub's large file store and of a card's header come as ValueError, failed file uploads as RuntimeError
FAILURES: tuple[type[BaseException], ...] = (*HUB_ERRORS, RuntimeError, ValueError)
ATTEMPTS = 3
WAIT_SECONDS = 2.0


def upload(folder: Path, repo_id: str, *, private: bool, replace: bool = False) -> str:
    """Make the repository hold exactly this folder's files; returns its address. Doing it again changes nothing.

    ``replace`` lets the same commit take the place of what else lies there; the repository's history keeps it.

    Raises:
        UserError: without a token, for a repository that holds something else or is public where it should not be, or
            when the Hub cannot be reached; nothing is half published then.
    """
    if not get_token():
        raise UserError("no token for the Hub: run hf auth login, or set HF_TOKEN for this command")
    api = HfApi()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return upload_once(api, folder, repo_id, private=private, replace=replace)
        except FAILURES as error:
            if attempt == ATTEMPTS or not may_pass(error):
                raise UserError(explain_failure(error, repo_id)) from None  # the cause may quote headers
            time.sleep(WAIT_SECONDS * attempt)
    raise AssertionError("the loop returns or raises")


def upload_once(api: HfApi, folder: Path, repo_id: str, *, private: bool, replace: bool) -> str:
    """One try. What is there already is compared first, so that a commit whose answer was lost is not made twice."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.whoami()  # a wrong token, too, makes private repositories invisible
        api.create_repo(repo_id, private=True, exist_ok=True)
        info = api.model_info(repo_id)
    if private and not info.private:
        raise UserError(
            f"{repo_id} is public, but publish.private is true: set publish.private=false, or use another id"
        )
    there = list_remote(api, repo_id)
    if differing := find_differing(folder, there):
        foreign = sorted(name for name in differing if name in there)
        if foreign and not replace:
            raise UserError(
                f"{repo_id} holds other files already ({', '.join(foreign[:4])}): choose another publish.repo_id, or "
                "replace them in one commit with --replace; the repository's history keeps them"
            )
        operations = [
            CommitOperationAdd(name, folder / name) if (folder / name).is_file() else CommitOperationDelete(name)
            for name in differing
        ]
        # with its parent named, the commit fails when somebody else was faster
        api.create_commit(
            repo_id, operations, commit_message=f"Publish {folder.name}", parent_commit=info.sha, num_threads=2
        )
        if wrong := find_differing(folder, list_remote(api, repo_id)):
            raise UserError(f"{repo_id} does not hold what was sent ({', '.join(wrong[:4])}); it is left as it was, "
                            "private if it was made now: do it again")  # fmt: skip
    if not private and info.private:
        make_public(api, repo_id)
    return f"{api.endpoint}/{repo_id}"


def make_public(api: HfApi, repo_id: str) -> None:
    """The last step, when all files are there.

    Raises:
        UserError: when the Hub refuses it.
    """
    try:
        api.update_repo_settings(repo_id, private=False)
    except FAILURES as error:
        if may_pass(error):
            raise
        raise UserError(
            f"all files are in {repo_id} and verified; only making it public failed: {reason_of(error)}. Do it on "
            "the Hub, or run the same command again with a token that may"
        ) from None


def list_remote(api: HfApi, repo_id: str) -> dict[str, RepoFile]:
    """The repository's files, without those of the Hub itself."""
    found = (entry for entry in api.list_repo_tree(repo_id, recursive=True) if isinstance(entry, RepoFile))
    return {file.path: file for file in found if file.path not in OWN_OF_THE_HUB}


def find_differing(folder: Path, there: dict[str, RepoFile]) -> list[str]:
    """Paths that lie only here, only there, or differ."""
    local = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(name for name in local | there.keys()
                  if name not in local or name not in there or not is_same(folder / name, there[name]))  # fmt: skip


def is_same(path: Path, remote: RepoFile) -> bool:
    """Whether a file is the repository's, which names the SHA-256 of large files and git's own hash of small ones."""
    if remote.lfs:
        return remote.lfs.sha256 == sha256_file(path)
    return remote.size == path.stat().st_size and remote.blob_id == git_hash(path.read_bytes())


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error; None where there was no answer. Failed file uploads wrap their cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code
        cause = cause.__cause__
    return None


def may_pass(error: BaseException) -> bool:
    """Whether the same try may succeed later: the Hub failed or did not answer; it did not refuse."""
    status = status_of(error)
    return not isinstance(error, ValueError) if status is None else status >= 500 or status == 429


def reason_of(error: BaseException) -> str:
    """An error's own words, or those of the failed upload that it wraps, without the token."""
    said = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    return shorten(str(said).replace(get_token() or "\0", "***"))


def explain_failure(error: BaseException, repo_id: str) -> str:
    """What went wrong and what to do."""
    reason = reason_of(error)
    if status_of(error) in (401, 403):
        return (
            f"the Hub does not let this token write to {repo_id}: {reason}. Make one with write access, and hf auth "
            "login or HF_TOKEN; HF_TOKEN comes before the login"
        )
    return (
        f"the upload to {repo_id} did not finish, and nothing of it is half there: {reason}. The folder is whole; the "
        "same command tries again, and sends only what is missing"
    )
