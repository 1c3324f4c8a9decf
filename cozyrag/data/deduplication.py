"""Find equal and nearly equal texts among more than memory holds: only a few bytes of each text are kept.

Equal texts have the same 64-bit hash. Near duplicates are found by MinHash (Broder 1997) over overlapping runs of 8
characters, which needs no knowledge of the language: one hash per run, its high bits choosing one of 64 bins
(one-permutation hashing, Li et al. 2012, arXiv:1208.1259), empty bins filled from others (Shrivastava 2017,
arXiv:1703.04664), one byte kept of each bin's minimum. Texts that agree in one of 16 bands of four bins are compared.
Left out: reading and writing texts.
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate, groupby

import numpy as np

BINS, BAND = 64, 4  # texts that share 80 % of their runs meet in a band with probability 0.9998, 50 %: 0.64
RUN = 8  # characters
TOGETHER = 1_000_000  # characters hashed at once

_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)
_EMPTY = np.uint64(2**64 - 1)


def text_hash(*texts: str) -> int:
    """64 bits that depend on the content alone: the same on every machine."""
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


def signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures (n_texts, BINS) uint8; case and the width of spaces do not count."""
    folded = [" ".join(text.lower().split()).ljust(RUN) for text in texts]
    batches = groupby(zip(accumulate(map(len, folded)), folded, strict=True), lambda each: each[0] // TOGETHER)
    made = [_signatures([text for _, text in batch]) for _, batch in batches]
    return np.concatenate([np.zeros((0, BINS), dtype=np.uint8), *made])


def _signatures(texts: list[str]) -> np.ndarray:
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    whole = owner[: 1 - RUN] == owner[RUN - 1 :]  # a run that reaches into the next text does not count
    hashes, owner = _mixed(_rolling(characters))[whole], owner[: 1 - RUN][whole]
    least = np.full(len(texts) * BINS, _EMPTY)
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
    """Fill empty bins from other bins, in an order that is the same for all texts."""
    filled = least.copy()
    for attempt in range(1, BINS):
        empty = filled == _EMPTY
        if not empty.any():
            break
        lender = (np.arange(BINS) * 37 + attempt * 11 * (np.arange(BINS) | 1)) % BINS
        filled = np.where(empty, least[:, lender], filled)
    return np.where(filled == _EMPTY, least.min(axis=1, keepdims=True), filled)


def repeats(keys: np.ndarray) -> np.ndarray:
    """(n,) bool: which of these keys occur earlier in the array."""
    again = np.ones(len(keys), dtype=bool)
    again[np.unique(keys, return_index=True)[1]] = False
    return again


def near_repeats(signs: np.ndarray, least: float) -> np.ndarray:
    """(n,) bool: which texts share an estimated `least` of their runs (Jaccard) with an earlier one.

    In each band a text is compared with the first that agrees with it there and with the last before it. 64 bins
    estimate the share to about 0.05. Needs about 30 bytes a text beside `signs` (n, BINS) uint8, which may be a memmap.
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
    """Estimated Jaccard similarity of pairs of texts: the share of equal bytes, corrected for chance."""
    step, shares = 100_000, [np.zeros(0)]
    for start in range(0, len(rows), step):
        pairs = signs[rows[start : start + step]] == signs[others[start : start + step]]
        shares.append((pairs.mean(axis=1) - 1 / 256) / (1 - 1 / 256))
    return np.concatenate(shares)
