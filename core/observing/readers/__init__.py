"""How one call of a model is read, by what the model's family says of itself."""

from __future__ import annotations

from ...architectures import Family
from .blocks import BlockReading
from .patches import PatchReading
from .prefixes import PrefixReading
from .reading import Reading
from .words import WordReading

_READINGS: dict[str, type[Reading]] = {
    "patches": PatchReading,
    "blocks": BlockReading,
    "words": WordReading,
    "prefixes": PrefixReading,
}
# All that any of them can score.
SPACES = tuple(dict.fromkeys(space for reading in _READINGS.values() for space in reading.SPACES))


def reading_of(family: Family) -> type[Reading]:
    """What reads calls of the family's models."""
    return _READINGS[family.reader]
