"""Bearer tokens: who may ask, and in which namespace."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
from pathlib import Path

from sac_rag.server.refusals import RefusalError

TOKENS_VARIABLE = "SAC_RAG_TOKENS"

# The characters of RFC 6750, with a namespace behind a colon.
_ENTRY = re.compile(r"([A-Za-z0-9._~+/-]{16,}=*)(?::(.*))?")


class Tokens:
    """Tokens with their namespaces; without any, everybody asks in the namespace "".

    A token without a namespace has the namespace "", which is that of a collection.

    Raises:
        ValueError: for a token that is too short, has other characters than RFC 6750 allows, or
            occurs twice. The message does not repeat it.
    """

    def __init__(self, entries: list[str]) -> None:
        self._namespaces: dict[bytes, str] = {}
        for number, entry in enumerate(entries, start=1):
            match = _ENTRY.fullmatch(entry)
            if match is None:
                raise ValueError(
                    f"token {number} must be at least 16 letters, digits or any of ._~+/-, "
                    "followed by :NAMESPACE if it has one, was something else; "
                    "make one: openssl rand -hex 32"
                )
            if (token := match[1].encode()) in self._namespaces:
                raise ValueError(f"token {number} is there twice; give each user another one")
            self._namespaces[token] = match[2] or ""

    @classmethod
    def read(cls, path: Path | None) -> Tokens:
        """The tokens of a file, one per line, or else those of SAC_RAG_TOKENS, at spaces or commas.

        Raises:
            ValueError: as the class; or if the file has no token.
            OSError: if it cannot be read.
        """
        if path is None:
            sent = re.split(r"[\s,]+", os.environ.get(TOKENS_VARIABLE, ""))
            return cls([entry for entry in sent if entry])
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        entries = [line for line in lines if line and not line.startswith("#")]
        if not entries:
            raise ValueError(f"{path} must have a token per line, has none")
        return cls(entries)

    def __len__(self) -> int:
        return len(self._namespaces)

    @property
    def namespaces(self) -> set[str]:
        """All namespaces that somebody may ask in."""
        return set(self._namespaces.values()) or {""}

    def namespace(self, authorization: str | None) -> str:
        """The namespace of a request, by its header.

        Raises:
            RefusalError: 401, if there are tokens and it has none of them.
        """
        if not self._namespaces:
            return ""
        scheme, _, token = (authorization or "").partition(" ")
        sent = token.strip().encode("utf-8", "surrogateescape")
        namespace = None
        # Each is compared in constant time, and all are: the time does not tell which was near.
        for known, of_known in self._namespaces.items():
            if hmac.compare_digest(known, sent):
                namespace = of_known
        if namespace is None or scheme.lower() != "bearer":
            raise RefusalError(
                401,
                "a bearer token is needed: Authorization: Bearer TOKEN",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return namespace


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host name or address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def require_local_host(header: str | None) -> None:
    """Refuses a request whose Host header is not this machine's.

    Where no token is asked for, a page in a browser could reach the server through a name of its
    site that resolves to 127.0.0.1.

    Raises:
        RefusalError: 421.
    """
    host = re.sub(r":\d*$", "", header or "")
    if not is_loopback(host):
        raise RefusalError(421, "the Host header must be localhost or a loopback address")
