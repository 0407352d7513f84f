"""Archives on the Hugging Face Hub: a repository with one archive, and what its bytes must be.

corpus.sacrag    the archive (see archive.py)
corpus.json      its digest, size, number of entries and fingerprint
README.md        dataset card; written only where there is none

No other file of a repository is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

from sac_rag.archive import Archive
from sac_rag.whole_file import DRAFT_SUFFIX, require_free

ARCHIVE, ABOUT, CARD = "corpus.sacrag", "corpus.json", "README.md"

_CARD = """\
---
tags:
- sac-rag
- kv-cache
---

# {name}

{entries} chunks of text, compressed to KV for [sac-rag](https://pypi.org/project/sac-rag): method
`{method}`, {ratio} source tokens per KV entry. They are as sensitive as the text that they are of.

```
sac-rag store pull {name} corpus.sacrag
```

Fingerprint of what made them: `{fingerprint}`
"""


@dataclass(frozen=True)
class About:
    """What `corpus.json` records of an archive.

    Attributes:
        sha256: Digest of its bytes.
        nbytes: Its size.
        entries: Number of chunks.
        fingerprint: Of the compressor that made them.
    """

    sha256: str
    nbytes: int
    entries: int
    fingerprint: str

    @classmethod
    def of(cls, path: Path) -> About:
        """Reads all of an archive.

        Raises:
            ValueError: if it is no archive.
        """
        archive = Archive(path)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for block in iter(partial(file.read, 2**20), b""):
                digest.update(block)
        nbytes, fingerprint = path.stat().st_size, archive.origin.fingerprint
        return cls(digest.hexdigest(), nbytes, len(archive), fingerprint)


def push(
    archive: str | os.PathLike[str],
    repo_id: str,
    *,
    repo_type: str = "dataset",
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool = True,
) -> str:
    """Uploads a verified archive in one commit; a card that is there stays.

    Args:
        archive: The file.
        repo_id: For example "user/corpus"; the repository is created if need be.
        repo_type: "dataset" or "model".
        revision: Branch, created if need be. Default: "main".
        token: Access token. Default: that of `hf auth login` or HF_TOKEN.
        private: Whether a new repository is private, and one that is public is refused.

    Returns:
        URL of the commit.

    Raises:
        ValueError: if the file is no archive or is damaged, or the repository is public.
        OSError: if the Hub cannot be reached or refuses, or is switched off with HF_HUB_OFFLINE.
    """
    path = Path(archive)
    opened = Archive(path)
    if bad := opened.verify():
        raise ValueError(f"{path} has {len(bad)} damaged entries ({bad[0]}); export it again")
    about = About.of(path)
    api = HfApi(token=token)
    with _refusals(f"{repo_id} cannot be pushed to"):
        created = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        name = created.repo_id
        is_public = not api.repo_info(name, repo_type=repo_type).private
    if private and is_public:
        raise ValueError(
            f"{name} is public, and whoever reads an archive can reconstruct what the documents "
            "say; give private=False (--public) if that is meant"
        )
    with _refusals(f"{name} cannot be pushed to"):
        if revision is not None:
            api.create_branch(name, branch=revision, repo_type=repo_type, exist_ok=True)
        files: dict[str, Path | bytes] = {
            ARCHIVE: path,
            ABOUT: json.dumps(asdict(about), indent=1).encode(),
        }
        if not api.file_exists(name, CARD, repo_type=repo_type, revision=revision):
            files[CARD] = _card(name, opened, about)
        commit = api.create_commit(
            name,
            [CommitOperationAdd(place, content) for place, content in files.items()],
            commit_message=f"Upload {about.entries} chunks",
            repo_type=repo_type,
            revision=revision,
        )
    return str(commit.commit_url)


def pull(
    repo_id: str,
    path: str | os.PathLike[str],
    *,
    repo_type: str = "dataset",
    revision: str | None = None,
    token: str | bool | None = None,
    fingerprint: str | None = None,
) -> Archive:
    """Downloads an archive into an owner-only (0600) file, which appears verified or not at all.

    Args:
        repo_id: A repository that `push` has written.
        path: A file that does not exist, in a folder with room for the archive.
        repo_type: As for `push`.
        revision: Branch, tag or commit. Default: "main".
        token: As for `push`.
        fingerprint: What must have made the chunks. Default: anything.

    Raises:
        FileExistsError: if the path exists.
        ValueError: if the repository has no archive, one of another fingerprint, or other bytes
            than were pushed.
        OSError: if the Hub cannot be reached or refuses, or the file cannot be written.
    """
    path = Path(path)
    require_free(path)
    refusals = partial(_refusals, f"{repo_id} cannot be pulled from")
    with tempfile.TemporaryDirectory(DRAFT_SUFFIX, f"{path.name}.", path.parent) as folder:
        with refusals():
            # One commit for both files, whatever is pushed meanwhile.
            info = HfApi(token=token).repo_info(repo_id, repo_type=repo_type, revision=revision)
            download = partial(
                hf_hub_download,
                repo_id,
                repo_type=repo_type,
                revision=info.sha,
                token=token,
                local_dir=folder,
            )
            about_file = Path(download(ABOUT))
        about = _read(about_file, repo_id)
        if fingerprint not in (None, about.fingerprint):
            raise ValueError(
                f"the chunks of {repo_id} must be of the fingerprint {fingerprint}, are of "
                f"{about.fingerprint}; give a revision that has them"
            )
        with refusals():
            draft = Path(download(ARCHIVE))
        if (actual := About.of(draft)) != about:
            raise ValueError(f"{repo_id} must have {about}, has {actual}; push it again")
        draft.chmod(0o600)
        require_free(path)
        draft.replace(path)
    return Archive(path)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Makes one sentence of what the Hub or the network raises."""
    try:
        yield
    except HFValidationError:
        raise
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"{what}: it is no repository of an archive of sac_rag") from error
    except Exception as error:  # of the Hub, of the network, of its settings
        # "error while uploading", says huggingface_hub, and its cause says which.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise OSError(f"{what}: {reason}") from error


def _read(path: Path, repo_id: str) -> About:
    try:
        return About(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{ABOUT} of {repo_id} is not that of an archive: {error}") from error


def _card(name: str, archive: Archive, about: About) -> bytes:
    config = archive.origin.config
    return _CARD.format(
        name=name, method=config.method, ratio=config.ratio, **asdict(about)
    ).encode()
