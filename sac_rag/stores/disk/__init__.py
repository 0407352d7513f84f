"""DiskStore: entries in files, their index in SQLite. Nothing outside imports from inside."""

from sac_rag.stores.disk.store import DiskStore

__all__ = ["DiskStore"]
