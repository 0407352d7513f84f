"""A precompressed corpus is pushed to the Hub and pulled, and arrives whole or not at all."""

from __future__ import annotations

import json
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
from support.hub import FakeHub, fake_hub
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from typer.testing import CliRunner

from sac_rag import SacRAG, archive
from sac_rag.archive import Archive
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.cli import app
from sac_rag.hub import ABOUT, ARCHIVE, CARD, pull, push
from sac_rag.lm.generator import Generator
from sac_rag.origin import Origin
from sac_rag.prompts.format import SPANS
from sac_rag.stores import DiskStore

REPO = "somebody/corpus"
DATASET = f"datasets/{REPO}"

# Uploads of huggingface_hub.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def carried(
    tmp_path_factory: pytest.TempPathFactory, make_generator: Callable[..., Generator]
) -> Path:
    """An archive of all of PROSE."""
    compressor = make_compressor(make_generator("llama"), "sac")
    path = tmp_path_factory.mktemp("carried") / "corpus.sacrag"
    cached = CachedCompressor(compressor, {})
    entries = (
        (cached.key(text), kv, ("doc",), cached.text_id(text))
        for text, kv in zip(PROSE, cached.compress(PROSE), strict=True)
    )
    archive.write(path, Origin.of(compressor, SPANS), entries)
    return path


def files_of(hub: FakeHub, branch: str = "main") -> dict[str, bytes]:
    return hub.branches[DATASET][branch]


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def test_what_is_pushed_is_pulled_to_the_byte_and_for_the_owner_only(
    carried: Path, hub: FakeHub, tmp_path: Path
) -> None:
    url = push(carried, REPO, token="secret")
    assert url.startswith(hub_constants.ENDPOINT)
    assert set(files_of(hub)) == {ARCHIVE, ABOUT, CARD}
    assert list(hub.large.values()) == [carried.read_bytes()]  # by git-lfs
    path = tmp_path / "pulled.sacrag"
    pulled = pull(REPO, path, token="secret", fingerprint=Archive(carried).origin.fingerprint)
    assert (pulled.path, len(pulled)) == (path, len(PROSE))
    assert path.read_bytes() == carried.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert hub.tokens == {"Bearer secret"}
    assert hub.downloads == [ABOUT, ARCHIVE]


def test_a_repository_is_private_unless_it_is_asked_to_be_public(
    carried: Path, hub: FakeHub
) -> None:
    push(carried, REPO, private=False)
    assert hub.private == set()
    with pytest.raises(ValueError, match=r"is public, .* give private=False"):
        push(carried, REPO)
    push(carried, "somebody/other")
    assert hub.private == {"datasets/somebody/other"}


def test_a_revision_is_pushed_to_and_pulled_from_and_a_card_stays(
    carried: Path, hub: FakeHub, tmp_path: Path
) -> None:
    push(carried, REPO)
    files_of(hub)[CARD] = b"my own words"
    push(carried, REPO, revision="v2")
    assert files_of(hub, "v2")[CARD] == b"my own words"
    del files_of(hub)[ARCHIVE]
    assert len(pull(REPO, tmp_path / "v2.sacrag", revision="v2")) == len(PROSE)


def test_who_may_not_push_or_pull_is_refused_in_a_sentence(
    carried: Path, hub: FakeHub, tmp_path: Path
) -> None:
    hub.members = {"Bearer member"}
    with pytest.raises(OSError, match=f"{REPO} cannot be pushed to: .*403"):
        push(carried, REPO, token="stranger")
    push(carried, REPO, token="member")
    with pytest.raises(OSError, match=f"{REPO} cannot be pulled from: .*401"):
        pull(REPO, tmp_path / "pulled.sacrag", token="stranger")
    with pytest.raises(OSError, match=r"cannot be pulled from: .*404"):
        pull("somebody/nothing", tmp_path / "pulled.sacrag", token="member")
    with pytest.raises(ValueError, match="Repo id must"):
        pull("a repository", tmp_path / "pulled.sacrag")
    assert is_empty(tmp_path)


def test_offline_nothing_is_pushed_or_pulled(carried: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="offline mode is enabled"):
        push(carried, REPO)
    with pytest.raises(OSError, match="offline mode is enabled"):
        pull(REPO, tmp_path / "pulled.sacrag")


def test_nothing_damaged_is_pushed(carried: Path, hub: FakeHub, tmp_path: Path) -> None:
    data = bytearray(carried.read_bytes())
    data[len(data) // 3] ^= 1
    damaged = tmp_path / "damaged.sacrag"
    damaged.write_bytes(data)
    with pytest.raises(ValueError, match=r"1 damaged entries .*; export it again"):
        push(damaged, REPO)
    with pytest.raises(ValueError, match="is no archive of sac_rag"):
        push(Path(__file__), REPO)
    assert hub.branches == {}


def foreign(files: dict[str, bytes]) -> None:
    files.clear()
    files["data.pkl"] = b"a pickle"


def other_json(files: dict[str, bytes]) -> None:
    files[ABOUT] = b'{"version": 1}'


def flipped(files: dict[str, bytes]) -> None:
    data = bytearray(files[ARCHIVE])
    data[len(data) // 3] ^= 1
    files[ARCHIVE] = bytes(data)


def other_fingerprint(files: dict[str, bytes]) -> None:
    about = json.loads(files[ABOUT])
    files[ABOUT] = json.dumps({**about, "fingerprint": "0" * 64}).encode()


def no_archive(files: dict[str, bytes]) -> None:
    files[ARCHIVE] = b"something else"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (foreign, "it is no repository of an archive of sac_rag"),
        (other_json, "corpus.json of somebody/corpus is not that of an archive"),
        (flipped, "must have About.*, has About"),
        (other_fingerprint, "must have About.*0000'.*, has About"),
        (no_archive, "is no archive of sac_rag"),
    ],
)
def test_what_was_not_pushed_so_is_refused_and_leaves_nothing(
    carried: Path, hub: FakeHub, tmp_path: Path, change: Callable[..., None], message: str
) -> None:
    push(carried, REPO)
    change(files_of(hub))
    with pytest.raises(ValueError, match=message):
        pull(REPO, tmp_path / "pulled.sacrag")
    assert "data.pkl" not in hub.downloads
    assert is_empty(tmp_path)


def test_chunks_of_another_compressor_are_refused_before_they_are_downloaded(
    carried: Path, hub: FakeHub, tmp_path: Path
) -> None:
    push(carried, REPO)
    with pytest.raises(ValueError, match=f"must be of the fingerprint {'ab' * 32}, are of"):
        pull(REPO, tmp_path / "pulled.sacrag", fingerprint="ab" * 32)
    assert hub.downloads == [ABOUT]


def test_a_connection_that_is_lost_is_resumed(carried: Path, hub: FakeHub, tmp_path: Path) -> None:
    push(carried, REPO)
    hub.cuts = [10**6, carried.stat().st_size // 2]  # about, archive
    pull(REPO, tmp_path / "pulled.sacrag")
    assert (tmp_path / "pulled.sacrag").read_bytes() == carried.read_bytes()
    assert hub.downloads == [ABOUT, ARCHIVE, ARCHIVE]


def test_an_interrupted_pull_leaves_nothing(carried: Path, hub: FakeHub, tmp_path: Path) -> None:
    push(carried, REPO)
    main = threading.main_thread().ident
    assert main is not None
    hub.cuts = [10**6, carried.stat().st_size // 2]
    hub.on_cut = lambda: None if hub.cuts else signal.pthread_kill(main, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pull(REPO, tmp_path / "pulled.sacrag")
    assert is_empty(tmp_path)


def test_nothing_is_overwritten(carried: Path, hub: FakeHub, tmp_path: Path) -> None:
    push(carried, REPO)
    (tmp_path / "pulled.sacrag").write_text("mine")
    with pytest.raises(FileExistsError, match="give another name"):
        pull(REPO, tmp_path / "pulled.sacrag")
    assert (tmp_path / "pulled.sacrag").read_text() == "mine"


def run(*arguments: str | Path, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["store", *map(str, arguments), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_a_store_is_pushed_and_pulled_by_commands(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_model("llama").save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    options = {"device": "cpu", "dtype": "float32"}
    with DiskStore(tmp_path / "store") as store:
        rag = SacRAG.from_pretrained(model, compressor="full", store=store, **options)
        rag.precompress([Chunk(text, id="doc") for text in PROSE])
        fingerprint = rag.compressor.fingerprint
    pushed = run("push", tmp_path / "store", REPO, "--token", "secret", "--compressor", "full")
    assert pushed["url"].startswith(hub_constants.ENDPOINT)
    assert hub.private == {DATASET}
    path = tmp_path / "pulled.sacrag"
    pulled = run("pull", REPO, path, "--fingerprint", fingerprint)
    assert pulled == {
        "written": len(PROSE),
        "fingerprint": fingerprint,
        "nbytes": path.stat().st_size,
    }
    served = SacRAG.from_archive(path, model, device="cpu")
    assert {chunk.status for chunk in served.answer("Who?", PROSE).chunks} == {"hit"}
    assert run("push", path, "somebody/other", "--public")["url"]
    assert hub.private == {DATASET}
