"""DiskStore: entries in files, their index in SQLite. Import from here, not from the files."""

from sac_rag.stores.disk.maintenance import Collected, FingerprintStats, Progress, StoreStats
from sac_rag.stores.disk.rebuild import Rebuilt
from sac_rag.stores.disk.store import DiskStore

__all__ = ["Collected", "DiskStore", "FingerprintStats", "Progress", "Rebuilt", "StoreStats"]
