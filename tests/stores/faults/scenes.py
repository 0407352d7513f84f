"""What a store does when a fault strikes it, and the states that may follow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from support.stores import flip, index_of, key_of, make_kv

from sac_rag.kv import AnchorKV
from sac_rag.stores import DiskStore
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.entry import encode

SIZE = len(encode(key_of(0), make_kv()))
OLD, NEW = Cipher(b"o" * 32), Cipher(b"n" * 32)
# Of the entries that every scene begins with: number, value, documents. Values from 10 have more
# KV entries.
BEFORE = {0: (0, ("a",)), 1: (1, ("a", "b")), 2: (2, ())}

State = dict[int, tuple[int, tuple[str, ...]]]


@dataclass(frozen=True)
class Scene:
    """A change of a store.

    Attributes:
        act: Makes the change.
        after: The store afterwards: number of each key, with value and documents.
        max_bytes: The store's cap.
        prepare: Changes the store before that.
        cipher: Of the store before.
        new_cipher: Of the store afterwards.
    """

    act: Callable[[DiskStore], object]
    after: State
    max_bytes: int = 2**30
    prepare: Callable[[DiskStore], object] = lambda store: None
    cipher: Cipher | None = None
    new_cipher: Cipher | None = None


def _age(store: DiskStore) -> None:
    with index_of(store) as index:  # number 0 was used longest ago
        for number in BEFORE:
            update = "UPDATE Cache SET access_time = access_time - ? WHERE key = ?"
            index.execute(update, (1000 - number, key_of(number)))


def _read_bad(store: DiskStore) -> None:
    with suppress(KeyError):
        store[key_of(0)]


SCENES = {
    "put": Scene(
        lambda store: store.put(
            key_of(5), make_kv(5), ["c"], text_id="aa" * 32, fingerprint="bb" * 32
        ),
        {**BEFORE, 5: (5, ("c",))},
    ),
    "put more": Scene(
        lambda store: store.put(key_of(1), make_value(11), ["c"]),
        {**BEFORE, 1: (11, ("a", "b", "c"))},
    ),
    "overwrite": Scene(
        lambda store: store.__setitem__(key_of(1), make_kv(7)), {**BEFORE, 1: (7, ("a", "b"))}
    ),
    "add a document": Scene(
        lambda store: store.put(key_of(2), make_kv(2), ["c"]), {**BEFORE, 2: (2, ("c",))}
    ),
    "evict": Scene(
        lambda store: store.__setitem__(key_of(5), make_kv(5)),
        {1: BEFORE[1], 2: BEFORE[2], 5: (5, ())},
        max_bytes=3 * SIZE,
        prepare=_age,
    ),
    "delete": Scene(lambda store: store.__delitem__(key_of(0)), {1: BEFORE[1], 2: BEFORE[2]}),
    "forget": Scene(lambda store: store.forget("a"), {1: (1, ("b",)), 2: BEFORE[2]}),
    "replace a document": Scene(
        lambda store: store.replace_document("a", [key_of(0)]), {**BEFORE, 1: (1, ("b",))}
    ),
    "quarantine": Scene(
        _read_bad, {1: BEFORE[1], 2: BEFORE[2]}, prepare=lambda store: flip(store, key_of(0))
    ),
    "note and pin": Scene(
        lambda store: (store.note("cc" * 32, {"a": "1"}), store.pin([key_of(0)])), dict(BEFORE)
    ),
    "re-encrypt": Scene(lambda store: store.rekey(NEW), dict(BEFORE), cipher=OLD, new_cipher=NEW),
}


def make(folder: Path, scene: Scene) -> None:
    """The store that a scene begins with."""
    with DiskStore(folder, cipher=scene.cipher) as store:
        for number, (value, documents) in BEFORE.items():
            store.put(key_of(number), make_value(value), documents)
        scene.prepare(store)


def make_value(seed: int) -> AnchorKV:
    return make_kv(seed, anchors=4 if seed < 10 else 5)


def value_of(kv: AnchorKV) -> int:
    """The seed that a value was made with."""
    (seed,) = (seed for seed in range(20) if kv.bit_equal(make_value(seed)))
    return seed


def require(folder: Path, name: str, finished: bool) -> None:
    """The store is as before or as after; as after, if that was acknowledged; and in order.

    Reading it raises nothing but a plain KeyError for what is not there.
    """
    scene = SCENES[name]
    ciphers = [scene.new_cipher] if finished else [scene.cipher, scene.new_cipher]
    store = _opened(folder, scene, ciphers)
    with store:
        if name == "re-encrypt" and not finished:
            store.rekey(NEW)  # resumes
        state: State = {}
        for key in list(store):
            with suppress(KeyError):
                number = next(number for number in range(10) if key_of(number) == key)
                kv = store[key]
                state[number] = (value_of(kv), store.documents(key))
                assert store.extent(key) == (kv.num_tokens, kv.num_entries)
                assert store.read(key, lambda _: 3).bit_equal(kv.first(3))
        before = dict(scene.after) if finished else dict(BEFORE)
        if name == "quarantine":
            before.pop(0, None)
        assert state in (before, scene.after), f"{name}: {state}"
        if name == "forget" and not finished:
            store.forget("a")
        store.check(fix=True)
        assert store.check() == []
        if name == "forget":
            assert not [path for path in folder.rglob("*") if key_of(0) in path.name]


def _opened(folder: Path, scene: Scene, ciphers: list[Cipher | None]) -> DiskStore:
    for cipher in ciphers[:-1]:
        with suppress(ValueError):
            return DiskStore(folder, cipher=cipher)
    return DiskStore(folder, cipher=ciphers[-1])
