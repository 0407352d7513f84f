"""store: what is in a store, and keeping it in order. Knows nothing of how either is done."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sac_rag.cli.console import AsJson, loading, progress
from sac_rag.cli.render import human_bytes, out, print_json, print_store

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher
    from sac_rag.stores.disk import DiskStore

app = typer.Typer(no_args_is_help=True, help="What is in a store, and keeping it in order.")

Folder = Annotated[Path, typer.Argument(help="Folder of a store, or of a collection.")]
KeyEnv = Annotated[
    str | None, typer.Option(help="Environment variable with the key of an encrypted store.")
]
KeyFile = Annotated[Path | None, typer.Option(help="File with the key of an encrypted store.")]


@app.command()
def stats(
    folder: Folder, key_env: KeyEnv = None, key_file: KeyFile = None, as_json: AsJson = False
) -> None:
    """Shows sizes, documents, hits, misses and their reasons, ages and fingerprints."""
    with open_store(folder, key_env, key_file, read_only=True) as store:
        found = store.stats()
        if as_json:
            print_json({"folder": str(store.folder), **asdict(found), "hit_rate": found.hit_rate})
        else:
            print_store(store.folder, found)


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
    if as_json:
        print_json({"problems": problems, "left": left})
    else:
        _print_problems(problems, "All is as it was written.")
        if fix and problems:
            _print_problems(left, "All of this is repaired.")
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
    if as_json:
        print_json({"entries": count, "nbytes": nbytes, "bad": bad})
    else:
        _print_problems(bad, f"{count} entries, {human_bytes(nbytes)}: all as they were written.")
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
        float | None, typer.Option(min=0, help="Delete entries stored so many seconds ago.")
    ] = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Deletes leftovers of killed writers, old quarantine, and what the options name."""
    with open_store(folder, key_env, key_file, max_age_s=max_age_s) as store:
        kept = None if keep_fingerprint is None else in_full(store, keep_fingerprint)
        done = store.gc(keep_fingerprints=kept)
    if as_json:
        print_json(asdict(done))
        return
    out.print(
        f"deleted {done.expired} expired and {done.superseded} superseded entries, "
        f"{done.leftovers} leftovers of killed writers, {done.quarantined} quarantined entries: "
        f"{human_bytes(done.nbytes)}"
    )


@app.command()
def forget(
    folder: Folder,
    documents: Annotated[list[str], typer.Argument(help="Ids of documents.")],
    namespace: Annotated[str, typer.Option(help="The tenant's, if they were put in one.")] = "",
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Deletes what only these documents use; no byte of it stays, in a collection of no text."""
    from sac_rag.namespace import Namespace

    ids = [Namespace(namespace).document_id(document) for document in documents]
    with open_store(folder, key_env, key_file) as store:
        deleted = store.forget(*ids)
    chunks = 0
    if (folder / "collection.json").is_file():
        with loading():
            from sac_rag.collection import forget_texts

            chunks = forget_texts(folder, documents)
    if as_json:
        print_json({"deleted": deleted, "chunks": chunks})
    else:
        searched = f", {chunks} chunks no longer to be found" if chunks else ""
        out.print(f"{deleted} entries deleted{searched}")


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
    """Keeps entries from being evicted, whatever else comes."""
    with open_store(folder, key_env, key_file) as store:
        chosen = [*(keys or ()), *(key for name in document or () for key in store.keys_of(name))]
        if not chosen:
            raise ValueError("nothing to pin: give keys, or --document with an id that has entries")
        done = store.unpin(chosen) if off else store.pin(chosen)
    if as_json:
        print_json({"asked": len(chosen), "done": done})
    else:
        out.print(f"{done} of {len(chosen)} entries {'un' if off else ''}pinned")


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
    """Encrypts every entry with another key; killed, it goes on when it is run again."""
    new = cipher_of(new_key_env, new_key_file)
    if (new is None) != plain:
        raise ValueError("give either --new-key-env, or --new-key-file, or --plain")
    with (
        open_store(folder, key_env, key_file) as store,
        progress("encrypting", total=store.nbytes, show=not as_json) as advance,
    ):
        done = store.rekey(new, on_progress=advance)
    if as_json:
        print_json({"encrypted": done})
    else:
        out.print(f"{done} entries written anew")


def open_store(
    folder: Path, key_env: str | None = None, key_file: Path | None = None, **options: Any
) -> DiskStore:
    """Opens a store that is there; makes none.

    Raises:
        ValueError: if the folder is no store, or the key not its own.
    """
    from sac_rag.stores.disk import DiskStore

    within = next((f for f in (folder, folder / "anchors") if (f / "store.json").is_file()), None)
    if within is None:
        raise ValueError(
            f"{folder} is no store: there is no store.json in it, nor in {folder / 'anchors'}"
        )
    return DiskStore(within, cipher=cipher_of(key_env, key_file), **options)


def cipher_of(key_env: str | None, key_file: Path | None) -> Cipher | None:
    """The key that --key-env or --key-file names, if either is given."""
    if key_env is None and key_file is None:
        return None
    from sac_rag.stores.cipher import Cipher

    if key_env is not None and key_file is not None:
        raise ValueError("give the key in an environment variable or in a file, not both")
    return Cipher.from_env(key_env) if key_env is not None else Cipher.from_file(str(key_file))


def in_full(store: DiskStore, shortened: list[str]) -> list[str]:
    """A store's fingerprints that begin so, one each."""
    there = [found.fingerprint for found in store.stats().fingerprints if found.fingerprint]
    kept = []
    for start in shortened:
        found = [fingerprint for fingerprint in there if fingerprint.startswith(start)]
        if len(found) != 1:
            raise ValueError(
                f"{start!r} must be the beginning of one of the store's fingerprints, is of "
                f"{len(found)}; there are: {', '.join(there) or 'none'}"
            )
        kept += found
    return kept


def _print_problems(problems: list[str], otherwise: str) -> None:
    for problem in problems:
        out.print(problem, style="yellow", markup=False)
    if not problems:
        out.print(otherwise)
