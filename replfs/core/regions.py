"""Sets of regions of one file's data, small in memory and quick to ask.

A region is `REGION_SIZE` bytes. A set whose members all lie in the first chunk is bits of an int
(32 to 64 bytes), any other is a roaring bitmap: a bitmap costs some 300 bytes, and most files of a
tree are small. Ranges are half-open. Sets are saved in chunks, so that a change rewrites little.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pyroaring import BitMap

REGION_SHIFT: Final = 16
REGION_SIZE: Final = 1 << REGION_SHIFT
"""Bytes."""
REGION_LIMIT: Final = 1 << 32
"""Regions from here on, 256 TiB into a file, are in no set."""
CHUNK_SHIFT: Final = 8
CHUNK_REGIONS: Final = 1 << CHUNK_SHIFT
"""Regions in a chunk, 16 MiB of a file. A chunk is at most 32 bytes when saved."""

Regions = int | BitMap
"""The empty set is always 0, never an empty bitmap. A bitmap is changed in place: a set has one
owner, who keeps what `add` and `remove` return."""

_MASK_BITS: Final = CHUNK_REGIONS


def overlaps(regions: Regions, first: int, last: int) -> bool:
    """Whether any of [first, last) is in the set; *last* may be beyond `REGION_LIMIT`."""
    if isinstance(regions, int):
        return (
            first < _MASK_BITS
            and regions >> first & ((1 << min(last, _MASK_BITS) - first) - 1) != 0
        )
    if last - first == 1 and first < REGION_LIMIT:
        return first in regions
    return 0 <= first_from(regions, first) < last


def contains(regions: Regions, first: int, last: int) -> bool:
    """Whether all of [first, last) is in the set."""
    if isinstance(regions, int):
        return last <= _MASK_BITS and not ~regions >> first & ((1 << last - first) - 1)
    if last - first == 1:
        return first in regions
    return regions.contains_range(first, last)


def count(regions: Regions, first: int, last: int) -> int:
    """How many of [first, last) are in the set."""
    if isinstance(regions, int):
        mask = (1 << min(last, _MASK_BITS)) - (1 << min(first, _MASK_BITS))
        return (regions & mask).bit_count()
    return regions.range_cardinality(first, last)


def add(regions: Regions, first: int, last: int) -> Regions:
    """The set with [first, last); *last* is at most `REGION_LIMIT`."""
    if isinstance(regions, int):
        if last <= _MASK_BITS:
            return regions | ((1 << last) - (1 << first))
        regions = _bitmap(regions)
    regions.add_range(first, last)
    return regions


def remove(regions: Regions, first: int, last: int) -> Regions:
    """The set without [first, last); *last* is at most `REGION_LIMIT`."""
    if isinstance(regions, int):
        mask = (1 << min(last, _MASK_BITS)) - (1 << min(first, _MASK_BITS))
        return regions & ~mask
    regions.remove_range(first, last)
    return regions or 0


def end(regions: Regions) -> int:
    """The region after the last one of the set; 0 of the empty set."""
    return regions.bit_length() if isinstance(regions, int) else regions.max() + 1


def copy(regions: Regions) -> Regions:
    """The same set with another owner."""
    return regions if isinstance(regions, int) else regions.copy()


def first_from(regions: Regions, first: int) -> int:
    """The first region from *first* on, or -1."""
    if isinstance(regions, int):
        rest = regions >> first
        return first + (rest & -rest).bit_length() - 1 if rest else -1
    if first >= REGION_LIMIT:
        return -1
    try:
        return regions.next_set_bit(first)
    except ValueError:
        return -1


def run_end(regions: Regions, first: int, limit: int) -> int:
    """Where the run that *first* is in ends, no further than *limit*."""
    if isinstance(regions, int):
        gap = ~(regions >> first)
        return min(limit, first + (gap & -gap).bit_length() - 1)
    limit = min(limit, REGION_LIMIT)
    end, step = first + 1, 1
    while end < limit and step:
        # Gallop, then halve: a run may be millions of regions long.
        if end + step <= limit and regions.contains_range(end, end + step):
            end += step
            step *= 2
        else:
            step //= 2
    return end


def runs(regions: Regions) -> Iterator[tuple[int, int]]:
    """All runs [first, last) of the set, as it is by then at each step."""
    first = 0
    while (first := first_from(regions, first)) >= 0:
        last = run_end(regions, first, REGION_LIMIT)
        yield first, last
        first = last


def chunks_of(first: int, last: int) -> range:
    """The chunks that hold any of [first, last), which is not empty."""
    return range(first >> CHUNK_SHIFT, ((last - 1) >> CHUNK_SHIFT) + 1)


def chunks(regions: Regions) -> list[int]:
    """The chunks that have any of the set, in order."""
    return sorted({chunk for run in runs(regions) for chunk in chunks_of(*run)})


def encode_chunk(regions: Regions, chunk: int, first: int, last: int) -> bytes:
    """A chunk of the regions and of [first, last), to be saved; empty if there is none.

    One bit a region, the lowest first, without the zero bytes at the end.
    """
    base = chunk << CHUNK_SHIFT
    if isinstance(regions, int):
        bits = regions if chunk == 0 else 0
    else:
        bits = _bits((regions & BitMap(range(base, base + CHUNK_REGIONS))).shift(-base))
    low, high = max(first - base, 0), min(last - base, CHUNK_REGIONS)
    if high > low:
        bits |= (1 << high) - (1 << low)
    return bits.to_bytes((bits.bit_length() + 7) >> 3, "little")


def decode_chunk(saved: bytes, chunk: int) -> Iterator[tuple[int, int]]:
    """The runs [first, last) of a chunk that `encode_chunk` made.

    Raises:
        ValueError: it cannot have made this.
    """
    bits = int.from_bytes(saved, "little")
    base = chunk << CHUNK_SHIFT
    if not bits or bits.bit_length() > CHUNK_REGIONS or not 0 <= base < REGION_LIMIT:
        raise ValueError("impossible set of regions")
    first = 0
    while (first := first_from(bits, first)) >= 0:
        last = run_end(bits, first, CHUNK_REGIONS)
        yield base + first, base + last
        first = last


def _bitmap(regions: int) -> BitMap:
    return BitMap([bit for bit in range(regions.bit_length()) if regions >> bit & 1])


def _bits(regions: BitMap) -> int:
    size = len(regions)
    if not size:
        return 0
    low = regions.min()
    if regions.max() - low + 1 == size:
        return ((1 << size) - 1) << low
    # `sum` and `map` stay in C: some 12 us for the worst of chunks.
    return sum(map((1).__lshift__, regions))
