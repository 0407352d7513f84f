"""store export | import: the chunks of a store as one file, and back."""

from __future__ import annotations

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
    from sac_rag.stores.disk import DiskStore


def export(
    folder: Folder,
    archive: ArchiveFile,
    compressor: Annotated[
        str | None,
        typer.Option(
            help="What compressed the chunks: 'full', 'shipped', 'fitted' or a folder. Default: "
            "that of the collection, else 'full'."
        ),
    ] = None,
    model: ModelOfCompressor = "smollm2-135m",
    fingerprint: Annotated[
        str | None,
        typer.Option(help="Whose chunks, where a store has those of several; may be shortened."),
    ] = None,
    decrypt: Annotated[
        bool, typer.Option("--decrypt", help="Write an encrypted store's chunks unencrypted.")
    ] = False,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Writes a store's chunks into one file, to serve them without their compressor."""
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
        with progress("exporting", total=len(store), show=not as_json) as advance:
            exported = export(store, archive, origin, decrypt=decrypt, on_progress=advance)
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
