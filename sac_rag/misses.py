"""Why a chunk was not read from the store: all the reasons. Knows nothing of who finds them out."""

from __future__ import annotations

# The only list of them. A reason may go into detail behind a colon, as in
# "fingerprint: config.ratio was 5, is 4"; what stands before it is one of these names.
REASONS = {
    "absent": "was never put there, as far as the store remembers",
    "evicted": "was dropped to keep the store below its cap",
    "expired": "was older than the store's max_age_s",
    "forgotten": "was deleted with the last document that had this text",
    "fingerprint": "the text is there, but as another model or compressor made it",
    "ratio": "is there, but with fewer entries than asked for",
    "corrupt": "was there, but its bytes were not the ones written",
    "format": "was written by another version of sac_rag",
    "key": "is encrypted, and not with the key that the store was opened with",
    "unreadable": "the store itself could not be read",
    "slow": "is there, but computing it anew was measured to be faster than reading it",
}


def name_of(reason: str) -> str:
    """The name of a reason, without its details: what to count by."""
    return reason.partition(":")[0]
