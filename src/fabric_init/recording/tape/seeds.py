"""Seeds that follow from others: of each recorded random op, and of each chunk of a large one."""

from __future__ import annotations

import hashlib

LAST_63_BITS = (1 << 63) - 1


def derived_seed(seed: int, position: int) -> int:
    """Return the seed for draw number ``position`` of the stream ``seed``: a 63-bit hash of both."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & LAST_63_BITS


def chunk_seed(stream_seed: int, position: int, chunk: int) -> int:
    """Return the seed for one chunk of draw number ``position`` of a stream: for the first, that of the whole draw."""
    seed = derived_seed(stream_seed, position)
    return derived_seed(seed, chunk) if chunk else seed
