"""RedisStore: AnchorKVs in a Redis or Valkey server, shared by machines (extra "redis").

    <prefix>e:<key>          the bytes of an entry (see entry.py), with a time to live
    <prefix>m:<key>          its record, a hash: extent, origin, and a field "d:<id>" per document
    <prefix>k:<document>     keys of a document's entries
    <prefix>x:<text id>      keys of a text's entries
    <prefix>t:<sha1 of key>  why an entry is gone
    <prefix>f:<fingerprint>  what a fingerprint is made of

Only entries (and reasons) have a time to live, so that under a `volatile-*` policy a full server
evicts no record: a record without its entry says that the entry was evicted. Whatever changes an
entry is one script on the server. The server is one node, not a Redis Cluster.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.stores.backoff import Backoff
from sac_rag.stores.base import strings
from sac_rag.stores.encoded import EncodedStore, Piece, kept_keys
from sac_rag.stores.entry import is_key
from sac_rag.stores.fingerprints import (
    Fields,
    fields_from_json,
    fields_to_json,
    nearest,
    require_fields,
)
from sac_rag.stores.redis_scripts import ADD, DISOWN, DROP, REINDEX, WHY

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise ImportError(
        "sac_rag.stores.redis needs the 'redis' extra: pip install 'sac-rag[redis]'"
    ) from error

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

_PREFIX = re.compile(r"[A-Za-z0-9_.:/-]*")  # nothing that SCAN would take as a pattern
_PAGE = 1000  # keys per SCAN
_DAY_S = 24 * 3600.0


class RedisStore(EncodedStore):
    """AnchorKVs in a Redis server, which evicts and expires them.

    No call holds up its caller for long: after a failure, calls raise a ConnectionError at once,
    and one at a time tries the server, until it answers again. May be shared by threads, and by
    processes on several machines.

    Args:
        url: Of the server, as redis-py takes it: redis://, rediss:// (TLS) or unix://. Nothing is
            connected before the first call.
        prefix: Of every key in the server: two prefixes are two stores.
        ttl_s: Seconds until an entry expires; None for never, and then a server with a
            `volatile-*` policy does not evict it either.
        cipher: Encrypts the entries and the documents' ids.
        connect_timeout_s: Longest wait for a connection.
        timeout_s: Longest wait for an answer.
        first_pause_s: Seconds without calls after a failure; doubled at each further one.
        most_pause_s: Most seconds without calls.

    Attributes:
        evictions: Evictions that this object has noticed, by reading or by `gc`.
        counters: Hits, misses, and their reasons; "failures" of the server, and calls "refused"
            until it was tried again.

    Raises:
        ValueError: for a prefix with other characters than letters, digits and _ . : / -, or a
            time to live that is not positive.
    """

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        prefix: str = "sac_rag:",
        ttl_s: float | None = 30 * _DAY_S,
        cipher: Cipher | None = None,
        connect_timeout_s: float = 0.5,
        timeout_s: float = 2.0,
        first_pause_s: float = 0.1,
        most_pause_s: float = 5.0,
    ) -> None:
        super().__init__(cipher)
        if not _PREFIX.fullmatch(prefix):
            raise ValueError(f"prefix must be of letters, digits and _ . : / -, was: {prefix!r}")
        if ttl_s is not None and not ttl_s > 0:
            raise ValueError(f"ttl_s must be more than 0, was: {ttl_s}")
        self.url, self.prefix, self.ttl_s = url, prefix, ttl_s
        self._limits = (connect_timeout_s, timeout_s, first_pause_s, most_pause_s)
        self._backoff = Backoff(first_pause_s, most_pause_s)
        # Once more where a pooled connection was closed meanwhile; never after a timeout.
        retry = Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,))
        self.client: Any = redis.Redis.from_url(
            url,
            socket_connect_timeout=connect_timeout_s,
            socket_timeout=timeout_s,
            retry=retry,
        )

    # A mapping.

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        """Writes an entry in place of the key's, if there is one; its documents stay."""
        self._write(key, kv, (), None, None)

    def __delitem__(self, key: str) -> None:
        if not is_key(key) or not self._call(DROP, key, "", ""):
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        if not is_key(key):
            return False
        with self._server() as client, client.pipeline(transaction=False) as pipe:
            pipe.exists(self._name("e", key)).hget(self._name("m", key), "codec")
            exists, codec = pipe.execute()
        return bool(exists) and codec == self._codec.encode()

    def __iter__(self) -> Iterator[str]:
        seen: set[str] = set()
        for key in self._scan("e"):
            if key not in seen and is_key(key):
                seen.add(key)
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Deletes everything with this prefix."""
        page: list[str] = []
        for key in self._scan(""):
            page.append(self.prefix + key)
            if len(page) == _PAGE:
                self._unlink(page)
                page = []
        self._unlink(page)

    def extent(self, key: str) -> tuple[int, int]:
        """Source tokens and stored KV entries of a chunk, without reading it."""
        if key in self:
            with self._server() as client:
                tokens, entries = client.hmget(self._name("m", key), ["tokens", "entries"])
            if tokens is not None and entries is not None:
                return int(tokens), int(entries)
        raise KeyError(key)

    def close(self) -> None:
        """Closes the connections; the next call opens one."""
        self.client.close()

    def __reduce__(self) -> tuple[Any, ...]:
        connect_timeout_s, timeout_s, first_pause_s, most_pause_s = self._limits
        opened = partial(
            type(self),
            prefix=self.prefix,
            ttl_s=self.ttl_s,
            cipher=self._cipher,
            connect_timeout_s=connect_timeout_s,
            timeout_s=timeout_s,
            first_pause_s=first_pause_s,
            most_pause_s=most_pause_s,
        )
        return opened, (self.url,)

    # Documents.

    def put(
        self,
        key: str,
        kv: AnchorKV,
        documents: Iterable[str] = (),
        *,
        text_id: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Writes an entry unless one with as many KV entries is there, and adds its documents.

        Raises:
            OSError: if the server cannot be written.
            TypeError, ValueError: if it cannot be stored, see `entry.encode`.
        """
        ids = strings(documents, "documents")
        if not self._add(key, b"", kv, ids, text_id, fingerprint, replaces=False):
            self._write(key, kv, ids, text_id, fingerprint, replaces=False)

    def documents(self, key: str) -> tuple[str, ...]:
        """Ids of the documents recorded for an entry, sorted, without reading it."""
        with self._server() as client:
            names = client.hkeys(self._name("m", key))
        if not names:
            raise KeyError(key)
        return self._unsealed(_text(name[2:]) for name in names if name.startswith(b"d:"))

    def origin_of(self, key: str) -> tuple[str | None, str | None]:
        """The text id and the fingerprint that an entry was put with; None where not known."""
        with self._server() as client:
            fields = client.hmget(self._name("m", key), ["text_id", "fingerprint"])
        text_id, fingerprint = (None if field is None else _text(field) for field in fields)
        return text_id, fingerprint

    def keys_of(self, document: str) -> list[str]:
        """Keys of a document's entries."""
        with self._server() as client:
            keys = map(_text, client.smembers(self._document(document)))
            return sorted(filter(is_key, keys))

    def replace_documents(self, documents: Mapping[str, Iterable[str]]) -> int:
        """Deletes what only these documents use, except some keys of each.

        Of what is deleted only the reason is kept. Where the server may evict records (an
        `allkeys-*` policy), all of them are read for it.
        """
        keep = kept_keys(documents)
        if keep and self._evicts_records():
            for key in self._scan("m"):
                self._call(REINDEX, key)
            for key in self._scan("e"):
                self._call(REINDEX, key)
        return sum(
            int(self._call(DISOWN, self._sealed(name), *keys)) for name, keys in keep.items()
        )

    # Reasons of misses.

    def note(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        """Records what a fingerprint is made of, so that a difference can be named."""
        require_fields(fingerprint, fields)
        with self._server() as client:
            client.set(self._name("f", fingerprint), fields_to_json(fields))

    def fields(self, fingerprint: str) -> Fields | None:
        """What a fingerprint is made of; None if it was not noted."""
        with self._server() as client:
            data = client.get(self._name("f", fingerprint))
        return None if data is None else fields_from_json(data)

    def why_absent(
        self, key: str, *, text_id: str | None = None, fingerprint: str | None = None
    ) -> str:
        """Why there is no entry: "evicted" by the server, "expired", "fingerprint: …" and others.

        An eviction is counted when it is noticed here first.
        """
        reason, is_new, others = self._call(WHY, key, text_id or "", fingerprint or "")
        if reason:
            reason = _text(reason)
            self._noticed(reason, bool(is_new))
        elif others:
            names = [_text(name) for name in others]
            reason = f"fingerprint: {nearest(names, fingerprint or '', self.fields)}"
        else:
            reason = "absent"
        self._count(f"miss.{reason.partition(':')[0]}")
        return reason

    def gc(self) -> dict[str, int]:
        """Removes the records of entries that the server has evicted or expired; how many of each.

        Eviction is noticed here, or when an entry is asked for.
        """
        gone: dict[str, int] = {}
        for key in self._scan("m"):
            reason, is_new, _ = self._call(WHY, key, "", "")
            if is_new:
                self._noticed(_text(reason), True)
                gone[_text(reason)] = gone.get(_text(reason), 0) + 1
        return gone

    # The server.

    def _fetch(self, asked: Mapping[str, int | None]) -> dict[str, Piece | None]:
        with self._server() as client, client.pipeline(transaction=False) as pipe:
            for key, nbytes in asked.items():
                name = self._name("e", key)
                pipe.hexists(self._name("m", key), "codec")  # without a record nothing is served
                if nbytes is None:
                    pipe.get(name).strlen(name)
                else:
                    pipe.getrange(name, 0, nbytes - 1).strlen(name)
            answers = iter(pipe.execute())
        pieces: dict[str, Piece | None] = {}
        for key, has_record, data, total in zip(asked, answers, answers, answers, strict=True):
            pieces[key] = Piece(data, total) if has_record and data else None
        return pieces

    def _drop_bad(self, key: str, piece: Piece, error: CorruptEntryError) -> bool:
        if error.reason != "corrupt":
            return True  # another version's or key holder's, for whom nothing is wrong with it
        digest = hashlib.sha1(piece.data, usedforsecurity=False).hexdigest()
        with contextlib.suppress(OSError):
            return bool(self._call(DROP, key, "corrupt", digest, len(piece.data)))
        return True

    def _write(
        self,
        key: str,
        kv: AnchorKV,
        ids: Iterable[str],
        text_id: str | None,
        fingerprint: str | None,
        replaces: bool = True,
    ) -> None:
        data = self._encoded(key, kv, fingerprint)
        self._add(key, data, kv, ids, text_id, fingerprint, replaces)

    def _add(
        self,
        key: str,
        data: bytes,
        kv: AnchorKV,
        ids: Iterable[str],
        text_id: str | None,
        fingerprint: str | None,
        replaces: bool,
    ) -> bool:
        """Writes an entry, or, without data, only records of one that is there; False if not."""
        if not isinstance(kv, AnchorKV):
            raise TypeError(f"a store holds AnchorKVs, got: {type(kv).__name__}")
        ttl_ms = 0 if self.ttl_s is None else max(1, round(1000 * self.ttl_s))
        record = (kv.num_tokens, kv.num_entries, self._codec, text_id or "", fingerprint or "")
        sealed = map(self._sealed, ids)
        return bool(self._call(ADD, key, data, int(replaces), ttl_ms, *record, *sealed))

    def _call(self, script: str, *arguments: Any) -> Any:
        with self._server() as client:
            return client.eval(script, 0, self.prefix, *arguments)

    @contextlib.contextmanager
    def _server(self) -> Iterator[Any]:
        """The client, unless the server has just failed; its errors become OSErrors."""
        if not self._backoff.admits():
            self._count("refused")
            raise ConnectionError(f"the Redis server of the store {self.prefix!r} has failed")
        try:
            yield self.client
            self._backoff.succeeded()
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
            self._backoff.failed()
            self._count("failures")
            raise ConnectionError(f"the Redis server failed: {error}") from error
        except redis.exceptions.RedisError as error:
            self._backoff.succeeded()  # it has answered: full, read-only or of another kind
            raise OSError(f"the Redis server refused: {error}") from error

    def _scan(self, kind: str) -> Iterator[str]:
        """Rest of the names that begin with prefix and kind; some may come twice."""
        begin = f"{self.prefix}{kind}:" if kind else self.prefix
        cursor = 0
        while True:
            with self._server() as client:
                cursor, names = client.scan(cursor, match=f"{begin}*", count=_PAGE)
            yield from (_text(name)[len(begin) :] for name in names)
            if not cursor:
                return

    def _unlink(self, names: list[str]) -> None:
        if names:
            with self._server() as client:
                client.unlink(*(name.encode("utf-8", "surrogatepass") for name in names))

    def _evicts_records(self) -> bool:
        with self._server() as client:
            return str(client.info("memory").get("maxmemory_policy", "")).startswith("allkeys")

    def _noticed(self, reason: str, is_new: bool) -> None:
        if is_new and reason == "evicted":
            with self._counting:
                self.evictions += 1

    def _name(self, kind: str, rest: str) -> str:
        return f"{self.prefix}{kind}:{rest}"

    def _document(self, document: str) -> bytes:
        return self._name("k", "").encode() + self._sealed(document)

    def _sealed(self, document: str) -> bytes:
        # surrogatepass: half a surrogate pair is no valid text, but no reason to crash either.
        return self._seal(document).encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
