"""The tables of a DiskStore's index beside diskcache's own. Knows nothing of what reads them."""

from __future__ import annotations

import json
import secrets
import sqlite3

VERSION = 3

# What diskcache's table says of an entry, and we use: key, size, filename, store_time,
# access_time, and tag: not NULL where the entry is pinned.
_TABLES = """
CREATE TABLE IF NOT EXISTS Owner (
    document BLOB NOT NULL,       -- an id, see documents.py
    key TEXT NOT NULL,
    PRIMARY KEY (document, key)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS Owner_key ON Owner (key);
CREATE TABLE IF NOT EXISTS Origin (
    key TEXT PRIMARY KEY,
    text_id TEXT,                 -- the same for the text under every fingerprint
    fingerprint TEXT,
    num_tokens INTEGER,           -- of the chunk; NULL where format 2 wrote the entry
    num_entries INTEGER,          -- of its KV, in all heads together
    num_heads INTEGER             -- KV heads of all layers together
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS Origin_text_id ON Origin (text_id);
CREATE TABLE IF NOT EXISTS Departed (
    number INTEGER PRIMARY KEY,   -- grows, so that the oldest can be dropped
    digest BLOB NOT NULL UNIQUE,  -- of a key that is no longer there
    reason TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS Meta (
    name TEXT PRIMARY KEY,        -- salt, cipher, and counters
    value
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS Cache_evictable ON Cache (access_time) WHERE tag IS NULL;
"""


def prepare(connection: sqlite3.Connection) -> None:
    """Makes the tables, unless they are there; must be called outside of a transaction.

    A store of format 1 kept an entry's documents as a JSON list in diskcache's tag. One of format
    2 did not say how much of a chunk an entry holds.
    """
    if _version(connection) == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection)  # another may have been faster
        if version == 2:
            for column in ("num_tokens", "num_entries", "num_heads"):
                connection.execute(f"ALTER TABLE Origin ADD COLUMN {column} INTEGER")
        elif version != VERSION:
            for statement in _TABLES.split(";\n"):
                connection.execute(statement)
            tagged = "SELECT CAST(key AS TEXT), CAST(tag AS TEXT) FROM Cache WHERE tag IS NOT NULL"
            for key, tag in connection.execute(tagged).fetchall():
                owners = [(document, key) for document in _documents_of_format_1(tag)]
                connection.executemany("INSERT OR IGNORE INTO Owner VALUES (?, ?)", owners)
            connection.execute("UPDATE Cache SET tag = NULL WHERE tag IS NOT NULL")
            # Format 1 knew no encryption.
            connection.execute(
                "INSERT OR IGNORE INTO Meta SELECT 'cipher', '' WHERE EXISTS (SELECT 1 FROM Cache)"
            )
            salt = secrets.token_bytes(32)
            connection.execute("INSERT OR IGNORE INTO Meta VALUES ('salt', ?)", (salt,))
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _documents_of_format_1(tag: str) -> list[bytes]:
    try:
        found = json.loads(tag)
    except (ValueError, RecursionError):
        return []
    if not isinstance(found, list):
        return []
    return [name.encode("utf-8", "surrogatepass") for name in found if isinstance(name, str)]
