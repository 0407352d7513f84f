"""store export | import | push | pull: the chunks of a store as one file, and back."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sac_rag.cli.options import (
    ArchiveFile,
    AsJson,
    Folder,
    KeyEnv,
    KeyFile,
    ModelOfCompressor,
)
from sac_rag.cli.progress import progress
from sac_rag.cli.render import human_bytes, notes, out, write
from sac_rag.cli.store import cipher_of, in_full, open_store

if TYPE_CHECKING:
    from sac_rag.archive import Exported
    from sac_rag.stores.disk import DiskStore

Made = Annotated[
    str | None,
    typer.Option(
        help="What compressed the chunks: 'full', 'shipped', 'fitted' or a folder. Default: "
        "that of the collection, else 'full'."
    ),
]
Whose = Annotated[
    str | None,
    typer.Option(help="Whose chunks, where a store has those of several; may be shortened."),
]
Decrypt = Annotated[
    bool, typer.Option("--decrypt", help="Write an encrypted store's chunks unencrypted.")
]
Repository = Annotated[str, typer.Argument(help="A dataset on the Hub, for example user/corpus.")]
Token = Annotated[
    str | None, typer.Option(help="Access token. Default: that of `hf auth login` or HF_TOKEN.")
]


def export(
    folder: Folder,
    archive: ArchiveFile,
    compressor: Made = None,
    model: ModelOfCompressor = "smollm2-135m",
    fingerprint: Whose = None,
    decrypt: Decrypt = False,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Writes a store's chunks into one file, to serve them without their compressor."""
    exported, chosen = _written(
        folder, archive, compressor, model, fingerprint, decrypt, key_env, key_file, as_json
    )
    nbytes = archive.stat().st_size

    def show() -> None:
        for problem in exported.bad:
            notes.print(f"left out {problem}", style="yellow", markup=False)
        others = f", {exported.others} of other compressors left out" if exported.others else ""
        out.print(f"{exported.written} chunks, {human_bytes(nbytes)}{others}")
        out.print(f"Serve: SacRAG.from_archive({str(archive)!r})", style="dim", markup=False)

    result = {**asdict(exported), "fingerprint": chosen, "nbytes": nbytes}
    write(result, show, as_json=as_json)
    if exported.bad:
        raise typer.Exit(1)


def import_(
    archive: ArchiveFile,
    folder: Annotated[
        Path, typer.Argument(help="Folder of a store, or of a collection, or a new one.")
    ],
    max_bytes: Annotated[int, typer.Option(min=1, help="Most bytes to keep there.")] = 64 * 2**30,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Copies an archive's chunks into a store, each verified; run again to resume."""
    from sac_rag.archive import Archive
    from sac_rag.collection import Collection
    from sac_rag.stores.disk import DiskStore

    within = folder / "anchors" if Collection.exists(folder) else folder
    cipher = cipher_of(key_env, key_file)
    opened = Archive(archive)
    with DiskStore(within, max_bytes, cipher=cipher) as store:
        with progress("importing", total=len(opened), show=not as_json) as advance:
            copied = opened.copy_to(store, advance)
        there, evicted = len(opened) - copied, store.evictions

    def show() -> None:
        out.print(f"{copied} chunks copied, {there} were there before")
        if evicted:
            notes.print(f"{evicted} were evicted again: raise --max-bytes", style="yellow")

    write({"copied": copied, "there": there, "evicted": evicted}, show, as_json=as_json)
    if evicted:
        raise typer.Exit(1)


def push(
    source: Annotated[Path, typer.Argument(help="An archive, or the folder of a store.")],
    repository: Repository,
    revision: Annotated[
        str | None, typer.Option(help="Branch, created if need be. Default: main.")
    ] = None,
    token: Token = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody read it. Default: private.")
    ] = False,
    compressor: Made = None,
    model: ModelOfCompressor = "smollm2-135m",
    fingerprint: Whose = None,
    decrypt: Decrypt = False,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Uploads an archive, or a store's chunks as one, to the Hugging Face Hub."""
    from sac_rag import hub

    with tempfile.TemporaryDirectory() as temporary:
        archive = source
        if source.is_dir():
            archive = Path(temporary) / hub.ARCHIVE
            exported, _ = _written(
                source, archive, compressor, model, fingerprint, decrypt, key_env, key_file, as_json
            )
            if exported.bad:
                raise ValueError(f"{exported.bad[0]}; see `sac-rag store check {source}`")
        url = hub.push(archive, repository, revision=revision, token=token, private=not public)
    write({"url": url}, lambda: out.print(url, markup=False), as_json=as_json)


def pull(
    repository: Repository,
    archive: ArchiveFile,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit. Default: main.")
    ] = None,
    token: Token = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="What must have made the chunks; anything else is refused.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Downloads an archive from the Hugging Face Hub; the file appears verified or not at all."""
    from sac_rag import hub

    pulled = hub.pull(repository, archive, revision=revision, token=token, fingerprint=fingerprint)
    made_by, nbytes = pulled.origin.fingerprint, archive.stat().st_size
    result = {"written": len(pulled), "fingerprint": made_by, "nbytes": nbytes}
    line = f"{len(pulled)} chunks, {human_bytes(nbytes)}, of the fingerprint {made_by}"
    write(result, lambda: out.print(line), as_json=as_json)


def _written(
    folder: Path,
    archive: Path,
    compressor: str | None,
    model: str,
    fingerprint: str | None,
    decrypt: bool,
    key_env: str | None,
    key_file: Path | None,
    quiet: bool,
) -> tuple[Exported, str]:
    """Writes a store's chunks of one fingerprint into an archive; returns the fingerprint too."""
    from sac_rag.archive import export
    from sac_rag.compressors import checkpoint
    from sac_rag.origin import Origin

    if compressor is None:
        compressor, model = _of_collection(folder, model)
    of = checkpoint.find(compressor, model)
    with open_store(folder, key_env, key_file, read_only=True) as store:
        chosen = _fingerprint(store, fingerprint)
        fields = store.fields(chosen)
        if fields is None:
            raise ValueError(f"{store.folder} does not say what the fingerprint {chosen} is of")
        origin = Origin.from_folder(fields, of)
        with progress("exporting", total=len(store), show=not quiet) as advance:
            exported = export(store, archive, origin, decrypt=decrypt, on_progress=advance)
    return exported, chosen


def _of_collection(folder: Path, model: str) -> tuple[str, str]:
    """Compressor and model of a folder's chunks, from its settings where it is a collection."""
    from sac_rag.collection import Collection, read_settings

    if not Collection.exists(folder):
        return "full", model
    settings = read_settings(folder)
    return settings.compressor or "full", settings.model


def _fingerprint(store: DiskStore, shortened: str | None) -> str:
    """The fingerprint that begins as asked for, or the only one of a store."""
    if shortened is not None:
        return in_full(store, [shortened])[0]
    counts = {made_by.fingerprint: made_by.entries for made_by in store.stats().fingerprints}
    counts.pop(None, None)
    if len(counts) != 1:
        listed = ", ".join(f"{name} ({count} chunks)" for name, count in counts.items())
        raise ValueError(
            f"{store.folder} has chunks of {len(counts)} fingerprints"
            + (f": {listed}; give one with --fingerprint" if counts else ", so nothing to export")
        )
    return str(next(iter(counts)))
