"""Seeds that follow from other numbers and names."""

import random


def derive_seed(*parts: int | str) -> int:
    """One seed, in [0, 2^63), out of several parts; the same on every machine."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)
