"""Cipher: keys are taken from where they are safe, told apart, and never shown."""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sac_rag.stores.cipher import Cipher

KEY = bytes(range(32))
SPELLINGS = {
    "hex": KEY.hex(),
    "upper-case hex": KEY.hex().upper(),
    "base64": base64.b64encode(KEY).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(bytes([255]) * 32).decode(),
    "base64 without padding": base64.b64encode(KEY).decode().rstrip("="),
    "with a new line": KEY.hex() + "\n",
}
NO_KEYS = {
    "empty": "",
    "a password": "correct horse battery staple",
    "32 characters": "x" * 32,
    "too short": KEY[:31].hex(),
    "too long": (KEY + b"x").hex(),
    "short base64": base64.b64encode(KEY[:16]).decode(),
    "not ASCII": "é" * 64,
}


def key_file(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / "key"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_key_is_read_from_environment_and_file(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_KEY", SPELLINGS[spelling])
    expected = Cipher(bytes([255]) * 32 if "URL" in spelling else KEY)
    assert Cipher.from_env("STORE_KEY").id == expected.id
    assert Cipher.from_file(key_file(tmp_path, SPELLINGS[spelling])).id == expected.id


@pytest.mark.parametrize("what", NO_KEYS)
def test_what_is_no_key_is_refused_without_showing_it(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = NO_KEYS[what]
    monkeypatch.setenv("STORE_KEY", text)
    path = key_file(tmp_path, text)
    for source, take in ((path, Cipher.from_file), ("STORE_KEY", Cipher.from_env)):
        with pytest.raises(ValueError, match=r"must hold 32 bytes .*openssl rand") as error:
            take(source)  # type: ignore[arg-type]
        assert str(source) in str(error.value)
        assert not text or text not in str(error.value)


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORE_KEY", raising=False)
    with pytest.raises(ValueError, match="variable STORE_KEY must hold a key and is not set"):
        Cipher.from_env("STORE_KEY")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such modes")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_key_file_that_others_can_use_is_refused(mode: int, tmp_path: Path) -> None:
    path = key_file(tmp_path, KEY.hex(), mode)
    with pytest.raises(PermissionError, match=rf"must be its owner's alone .*has mode {mode:o}"):
        Cipher.from_file(path)


@pytest.mark.parametrize(
    ("key", "error"), [(b"", ValueError), (KEY[:16], ValueError), ("x" * 32, TypeError)]
)
def test_a_key_has_32_bytes(key: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="a key must"):
        Cipher(key)


def test_what_was_encrypted_is_decrypted_with_the_same_key_and_words_alone() -> None:
    cipher, other = Cipher(KEY), Cipher(bytes(32))
    data = cipher.encrypt(b"the keeper's name", b"about")
    assert len(data) == len(b"the keeper's name") + Cipher.overhead
    assert cipher.decrypt(data, b"about") == b"the keeper's name"
    assert b"keeper" not in data
    for decrypt in (
        lambda: other.decrypt(data, b"about"),
        lambda: cipher.decrypt(data, b"another"),
        lambda: cipher.decrypt(data[:-1], b"about"),
        lambda: cipher.decrypt(bytes([data[0] ^ 1]) + data[1:], b"about"),
        lambda: cipher.decrypt(data[:20], b"about"),
    ):
        with pytest.raises(ValueError, match="encrypted"):
            decrypt()


def test_no_nonce_is_used_twice() -> None:
    cipher = Cipher(KEY)
    assert len({cipher.encrypt(b"", b"")[:12] for _ in range(1000)}) == 1000


def test_keys_are_told_apart_by_an_id_that_does_not_show_them() -> None:
    assert Cipher(KEY).id == Cipher(KEY).id == "d4c63b02e1fb31fa"
    assert Cipher(KEY).id != Cipher(bytes(32)).id
    for shown in (repr(Cipher(KEY)), str(Cipher(KEY)), f"{Cipher(KEY)!r}"):
        assert Cipher(KEY).id in shown
        assert KEY.hex() not in shown
        assert repr(KEY) not in shown


def test_a_cipher_can_be_sent_to_another_process() -> None:
    cipher = Cipher(KEY)
    data = pickle.loads(pickle.dumps(cipher)).encrypt(b"text", b"")
    assert cipher.decrypt(data, b"") == b"text"


def test_without_the_extra_the_rest_works_and_the_cipher_says_how_to_get_it() -> None:
    code = """
import sys
sys.modules["cryptography"] = None
import sac_rag.stores.disk.store
try:
    import sac_rag.stores.cipher
except ImportError as error:
    print(error)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "needs the 'encrypt' extra: pip install 'sac-rag[encrypt]'" in process.stdout
