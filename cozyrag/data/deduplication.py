"""Which texts are the same, or nearly, among more of them than memory holds: a few bytes are kept of each.

Equal texts are found by a 64-bit hash. Near ones by MinHash (Broder 1997) over overlapping runs of 8 characters, which asks
nothing about the language: one hash per run, its high bits choosing one of 64 bins (one-permutation hashing, Li et al. 2012,
arXiv:1208.1259), empty bins filled from others (Shrivastava 2017, arXiv:1703.04664), a byte kept of each bin's minimum. Texts
that agree in one of 16 bands of four bins are compared. Left out: reading and writing texts.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

BINS, BAND = 64, 4  # texts that share 80 % of their runs meet in a band with probability 0.9998, 50 %: 0.64
RUN = 8  # characters
TOGETHER = 1_000_000  # characters hashed at once

_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)
_NOTHING = np.uint64(2**64 - 1)


def text_hash(*texts: str) -> int:
    """64 bits of the content: the same for the same texts on every machine."""
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


def signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures (n_texts, BINS) uint8; case and the width of spaces do not count."""
    folded = [" ".join(text.lower().split()).ljust(RUN) for text in texts]
    made, start = [np.zeros((0, BINS), dtype=np.uint8)], 0
    while start < len(folded):
        end, size = start, 0
        while end < len(folded) and (end == start or size + len(folded[end]) <= TOGETHER):
            size += len(folded[end])
            end += 1
        made.append(_signatures(folded[start:end]))
        start = end
    return np.concatenate(made)


def _signatures(texts: list[str]) -> np.ndarray:
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in texts])
    hashes = _mixed(_rolling(characters))
    owner = np.repeat(np.arange(len(texts)), lengths)[: len(hashes)]
    inside = (
        owner == np.repeat(np.arange(len(texts)), lengths)[RUN - 1 :]
    )  # runs that reach into the next text count not
    hashes, owner = hashes[inside], owner[inside]
    least = np.full(len(texts) * BINS, _NOTHING)
    np.minimum.at(least, owner * BINS + (hashes >> np.uint64(58)).astype(np.int64), hashes & np.uint64(2**58 - 1))
    return (_filled(least.reshape(len(texts), BINS)) & np.uint64(255)).astype(np.uint8)


def _rolling(characters: np.ndarray) -> np.ndarray:
    """One number for each run of RUN characters, by a polynomial modulo 2**64."""
    count = len(characters) - RUN + 1
    total = np.zeros(count, dtype=np.uint64)
    for i in range(RUN):
        total = total * _MULTIPLIERS[0] + characters[i : i + count]
    return total


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014), so that every bit depends on every bit."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MULTIPLIERS[1]
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MULTIPLIERS[2]
    return numbers ^ (numbers >> np.uint64(31))


def _filled(least: np.ndarray) -> np.ndarray:
    """Empty bins take what other bins hold, all texts asking the same bins in the same order."""
    filled = least.copy()
    for attempt in range(1, BINS):
        empty = filled == _NOTHING
        if not empty.any():
            break
        lender = (np.arange(BINS) * 37 + attempt * 11 * (np.arange(BINS) | 1)) % BINS
        filled = np.where(empty, least[:, lender], filled)
    return np.where(filled == _NOTHING, least.min(axis=1, keepdims=True), filled)


def repeats(keys: np.ndarray) -> np.ndarray:
    """(n,) bool: which of these keys stood earlier in the array already."""
    order = np.argsort(keys, kind="stable")
    again = np.zeros(len(keys), dtype=bool)
    again[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return again


def near_repeats(signs: np.ndarray, least: float) -> np.ndarray:
    """(n,) bool: which texts share an estimated `least` of their runs (Jaccard) with an earlier one.

    In each band a text is compared with the first that agrees with it there and with the last before it. 64 bins know the
    share to about 0.05. Works band by band: some 30 bytes a text beside `signs`, which may be memory-mapped.

    Args:
        signs: (n, BINS) uint8, of `signatures`.
    """
    near = np.zeros(len(signs), dtype=bool)
    for band in range(0, BINS, BAND):
        keys = np.ascontiguousarray(signs[:, band : band + BAND]).view(np.uint32).ravel()
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        again = np.flatnonzero(sorted_keys[1:] == sorted_keys[:-1]) + 1
        later = order[again]
        first = order[np.searchsorted(sorted_keys, sorted_keys[again])]
        for earlier in (first, order[again - 1]):
            near[later] |= _alike(signs, later, earlier) >= least
    return near


def _alike(signs: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of pairs of texts: the share of equal bytes, less what agrees by chance."""
    step, shares = 100_000, [np.zeros(0)]
    for start in range(0, len(rows), step):
        pairs = signs[rows[start : start + step]] == signs[others[start : start + step]]
        shares.append((pairs.mean(axis=1) - 1 / 256) / (1 - 1 / 256))
    return np.concatenate(shares)
