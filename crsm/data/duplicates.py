"""Exact and near duplicates among the units of a corpus.

Exact ones have the same hash. Near ones are looked for with MinHash: signatures by ``rensa`` (MIT), which is written in
Rust and takes the hashes of all shingles at once, at some 200 MB of text a second; ``datasketch`` takes them one by one
in Python. Units whose signatures share a band are compared, and the later of two whose signatures agree in the asked
share of places goes.

What is kept depends on the order of the units and on nothing else: each is compared with those kept before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crsm.data_config import DuplicatesConfig

_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)


def signatures(shingles: Sequence[np.ndarray], config: DuplicatesConfig, seed: int) -> np.ndarray:
    """MinHash signatures of the sets of shingles, one a row; zeros for an empty set. (U, permutations) uint32

    Raises:
        ValueError: rensa is not installed.
    """
    rows = np.zeros((len(shingles), config.permutations), np.uint32)
    filled = [unit for unit, hashes in enumerate(shingles) if len(hashes)]
    if not filled:
        return rows
    flat = np.concatenate([shingles[unit] for unit in filled])
    offsets = np.cumsum([0, *(len(shingles[unit]) for unit in filled)]).astype(np.uint64)
    matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, config.permutations, seed)
    rows[filled] = np.array(matrix.to_rows(), np.uint32)
    return rows


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a unit goes."""

    unit: int
    first: int
    """The unit that it repeats, which stays."""
    similarity: float
    """1 for exact duplicates, else as estimated."""
    exact: bool


def find_duplicates(
    digests: np.ndarray, signatures_UP: np.ndarray, compared: np.ndarray, config: DuplicatesConfig
) -> list[Verdict]:
    """The units that repeat an earlier one.

    Args:
        digests: a hash of every unit's text. (U,) of bytes
        signatures_UP: of every unit. (U, permutations) uint32
        compared: units that take part in the comparison of signatures. (U,) bool
        config: threshold and bands.
    """
    found: list[Verdict] = []
    alive = np.ones(len(digests), bool)
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    for unit in np.flatnonzero(first[inverse] != np.arange(len(digests))).tolist():
        found.append(Verdict(unit, int(first[inverse[unit]]), 1.0, exact=True))
        alive[unit] = False
    if config.enabled:
        candidates = np.flatnonzero(alive & compared & signatures_UP.any(axis=1))
        found += _near(candidates, signatures_UP, config)
    return sorted(found, key=lambda verdict: verdict.unit)


def _near(units: np.ndarray, signatures_UP: np.ndarray, config: DuplicatesConfig) -> list[Verdict]:
    bands_UB = _band_keys(signatures_UP[units], config.bands)
    shared = np.zeros(len(units), bool)
    for band in range(config.bands):
        _, inverse, counts = np.unique(bands_UB[:, band], return_inverse=True, return_counts=True)
        shared |= counts[inverse] > 1
    kept: list[dict[int, list[int]]] = [{} for _ in range(config.bands)]
    found: list[Verdict] = []
    for row in np.flatnonzero(shared).tolist():
        unit, keys = int(units[row]), bands_UB[row].tolist()
        others = sorted({other for band, key in enumerate(keys) for other in kept[band].get(key, ())})
        if others:
            agreement = (signatures_UP[others] == signatures_UP[unit]).mean(axis=1)
            best = int(agreement.argmax())
            if agreement[best] >= config.threshold:
                found.append(Verdict(unit, others[best], float(agreement[best]), exact=False))
                continue
        for band, key in enumerate(keys):
            kept[band].setdefault(key, []).append(unit)
    return found


def _band_keys(signatures_UP: np.ndarray, bands: int) -> np.ndarray:
    """(U, bands) uint64"""
    rows_UBr = signatures_UP.reshape(len(signatures_UP), bands, signatures_UP.shape[1] // bands).astype(np.uint64)
    keys = np.zeros(rows_UBr.shape[:2], np.uint64)
    for place in range(rows_UBr.shape[2]):
        keys = (keys ^ rows_UBr[:, :, place]) * _MULTIPLIER
        keys ^= keys >> np.uint64(32)
    return keys


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise ValueError(
            "duplicates.enabled = True needs the extra `data` (pip install 'crsm[data]'); allowed: false, or the extra"
        ) from error
    return rensa
