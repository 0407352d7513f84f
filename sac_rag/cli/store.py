"""store: the contents of a store, and its maintenance."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sac_rag.cli.console import loading
from sac_rag.cli.options import AsJson, Folder, KeyEnv, KeyFile
from sac_rag.cli.progress import progress
from sac_rag.cli.render import human_bytes, notes, out, print_store, write

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher
    from sac_rag.stores.disk import DiskStore

app = typer.Typer(no_args_is_help=True, help="What is in a store, and keeping it in order.")


@app.command()
def stats(
    folder: Folder, key_env: KeyEnv = None, key_file: KeyFile = None, as_json: AsJson = False
) -> None:
    """Shows sizes, documents, hits, misses and their reasons, ages and fingerprints."""
    with open_store(folder, key_env, key_file, read_only=True) as store:
        figures = store.stats()
        result = {"folder": str(store.folder), **asdict(figures), "hit_rate": figures.hit_rate}
        write(result, lambda: print_store(store.folder, figures), as_json=as_json)


@app.command()
def check(
    folder: Folder,
    fix: Annotated[
        bool, typer.Option(help="Quarantine what is bad, delete what belongs to nothing.")
    ] = False,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Reads everything and compares index and files; exit code 1 if something is wrong."""
    with open_store(folder, key_env, key_file, read_only=not fix) as store:
        with progress("reading", total=store.nbytes, show=not as_json) as advance:
            problems = store.check(fix=fix, on_progress=advance)
        left = store.check() if fix and problems else problems

    def show() -> None:
        _print_problems(problems, "All is as it was written.")
        if fix and problems:
            _print_problems(left, "All of this is repaired.")

    write({"problems": problems, "left": left}, show, as_json=as_json)
    if left:
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Folder, key_env: KeyEnv = None, key_file: KeyFile = None, as_json: AsJson = False
) -> None:
    """Reads every entry and changes nothing; exit code 1 if one is bad."""
    with open_store(folder, key_env, key_file, read_only=True) as store:
        count, nbytes = len(store), store.nbytes
        with progress("reading", total=nbytes, show=not as_json) as advance:
            bad = store.verify(on_progress=advance)
    intact = f"{count} entries, {human_bytes(nbytes)}: all as they were written."
    result = {"entries": count, "nbytes": nbytes, "bad": bad}
    write(result, lambda: _print_problems(bad, intact), as_json=as_json)
    if bad:
        raise typer.Exit(1)


@app.command()
def gc(
    folder: Folder,
    keep_fingerprint: Annotated[
        list[str] | None,
        typer.Option(help="Delete entries of any other fingerprint; may be repeated, shortened."),
    ] = None,
    max_age_s: Annotated[
        float | None, typer.Option(min=0, help="Delete entries older than this many seconds.")
    ] = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Deletes leftovers of killed writers, old quarantine, and entries named by the options."""
    with open_store(folder, key_env, key_file, max_age_s=max_age_s) as store:
        fingerprints = None if keep_fingerprint is None else in_full(store, keep_fingerprint)
        deleted = store.gc(keep_fingerprints=fingerprints)
    line = (
        f"deleted {deleted.expired} expired and {deleted.superseded} superseded entries, "
        f"{deleted.leftovers} leftovers of killed writers, {deleted.quarantined} quarantined "
        f"entries: {human_bytes(deleted.nbytes)}"
    )
    write(deleted, lambda: out.print(line), as_json=as_json)


@app.command()
def forget(
    folder: Folder,
    documents: Annotated[list[str], typer.Argument(help="Ids of documents.")],
    namespace: Annotated[str, typer.Option(help="Namespace of the documents, if any.")] = "",
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Deletes entries that only these documents have, to the last byte, and their texts.

    Exit code 1 if a document is not known; the others are deleted.
    """
    from sac_rag.namespace import Namespace

    with open_store(folder, key_env, key_file) as store:

        def id_of(name: str) -> str:
            stored_as = Namespace(namespace).document_id(name)
            # Without a namespace, an id may be given as it stands in the store.
            return stored_as if namespace or store.keys_of(stored_as) else name

        # Whatever reads files names ./a.txt a.txt.
        names = {
            name: name if store.keys_of(id_of(name)) else Path(name).as_posix()
            for name in documents
        }
        stored = {name for name in names.values() if store.keys_of(id_of(name))}
        deleted = store.forget(*map(id_of, names.values()))
    searched: dict[str, int] = {}
    if (folder / "collection.json").is_file():
        with loading():
            from sac_rag.collection import forget_texts

            searched = forget_texts(folder, names.values())
    chunks = sum(searched.values())
    unknown = [asked for asked, name in names.items() if name not in {*stored, *searched}]
    line = f"{deleted} entries deleted"
    line += f", {chunks} chunks no longer searchable" if chunks else ""
    result = {"deleted": deleted, "chunks": chunks, "unknown": unknown}
    write(result, lambda: out.print(line), as_json=as_json)
    for asked in unknown:
        notes.print(f"no document has the id {asked!r}", style="yellow")
    if unknown:
        raise typer.Exit(1)


@app.command()
def pin(
    folder: Folder,
    keys: Annotated[list[str] | None, typer.Argument(help="Keys of entries.")] = None,
    document: Annotated[
        list[str] | None, typer.Option(help="All entries of a document; may be repeated.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Let them be evicted again.")] = False,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Keeps entries from being evicted."""
    with open_store(folder, key_env, key_file) as store:
        chosen = [*(keys or ()), *(key for name in document or () for key in store.keys_of(name))]
        if not chosen:
            raise ValueError("nothing to pin: give keys, or --document with an id that has entries")
        changed = store.unpin(chosen) if off else store.pin(chosen)
    line = f"{changed} of {len(chosen)} entries {'un' if off else ''}pinned"
    result = {"asked": len(chosen), "done": changed}
    write(result, lambda: out.print(line), as_json=as_json)


@app.command()
def rekey(
    folder: Folder,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    new_key_env: Annotated[str | None, typer.Option(help="Like --key-env, the new key.")] = None,
    new_key_file: Annotated[Path | None, typer.Option(help="Like --key-file, the new key.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No longer encrypted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Encrypts every entry with another key; run again to resume."""
    new = cipher_of(new_key_env, new_key_file)
    if (new is None) != plain:
        raise ValueError("give either --new-key-env, or --new-key-file, or --plain")
    with (
        open_store(folder, key_env, key_file) as store,
        progress("encrypting", total=store.nbytes, show=not as_json) as advance,
    ):
        count = store.rekey(new, on_progress=advance)
    line = f"{count} entries written again"
    write({"encrypted": count}, lambda: out.print(line), as_json=as_json)


@app.command()
def rebuild(
    folder: Folder,
    max_bytes: Annotated[int, typer.Option(min=1, help="Most bytes to keep there.")] = 64 * 2**30,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Makes a lost or damaged index again from the entries; documents must be added again."""
    from sac_rag.stores.disk import DiskStore

    within = store_in(folder)
    cipher = cipher_of(key_env, key_file)
    with progress("reading", total=None, show=not as_json) as advance:
        rebuilt = DiskStore.rebuild(within, max_bytes, cipher=cipher, on_progress=advance)

    def show() -> None:
        _print_problems(
            [f"left out {problem}" for problem in rebuilt.left_out], "Nothing left out."
        )
        out.print(f"{rebuilt.entries} entries, {human_bytes(rebuilt.nbytes)}")
        out.print("Their documents are not known until they are precompressed again.", style="dim")

    write(rebuilt, show, as_json=as_json)


def store_in(folder: Path) -> Path:
    """The folder of the store that a folder is or has in it.

    Raises:
        ValueError: if there is none.
    """
    for within in (folder, folder / "anchors"):
        if (within / "store.json").is_file():
            return within
    raise ValueError(
        f"{folder} is no store: there is no store.json in it, nor in {folder / 'anchors'}"
    )


def open_store(
    folder: Path, key_env: str | None = None, key_file: Path | None = None, **options: Any
) -> DiskStore:
    """Opens an existing store; makes none.

    Raises:
        ValueError: if the folder is no store, or the key is of another one.
    """
    from sac_rag.stores.disk import DiskStore

    within = store_in(folder)
    return DiskStore(within, cipher=cipher_of(key_env, key_file), **options)


def cipher_of(key_env: str | None, key_file: Path | None) -> Cipher | None:
    """The key that --key-env or --key-file names; None for neither."""
    if key_env is None and key_file is None:
        return None
    from sac_rag.stores.cipher import Cipher

    if key_env is not None and key_file is not None:
        raise ValueError("give the key in an environment variable or in a file, not both")
    return Cipher.from_env(key_env) if key_env is not None else Cipher.from_file(str(key_file))


def in_full(store: DiskStore, shortened: list[str]) -> list[str]:
    """The store's fingerprints that begin with the shortened ones, one per beginning."""
    stored = [row.fingerprint for row in store.stats().fingerprints if row.fingerprint]
    fingerprints = []
    for start in shortened:
        matches = [fingerprint for fingerprint in stored if fingerprint.startswith(start)]
        if len(matches) != 1:
            raise ValueError(
                f"{start!r} must be the beginning of one of the store's fingerprints, is of "
                f"{len(matches)}; there are: {', '.join(stored) or 'none'}"
            )
        fingerprints += matches
    return fingerprints


def _print_problems(problems: list[str], otherwise: str) -> None:
    for problem in problems:
        out.print(problem, style="yellow", markup=False)
    if not problems:
        out.print(otherwise)
