"""The size found is the last that fits before one that does not, in few steps."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from smolpost.evaluation.fit_length import fitted, largest


class Counted:
    """A text of units of changing length, without end."""

    def __init__(self, seed, mean):
        rng = random.Random(seed)
        self.units = itertools.cycle(["x" * rng.randint(1, 2 * mean) + " " for _ in range(500)])
        self.text, self.ends = "head ", [5]

    def __call__(self, size):
        while len(self.ends) <= size:
            self.text += next(self.units)
            self.ends.append(len(self.text))
        return self.text[: self.ends[size]]


@given(st.integers(0, 99), st.integers(1, 40), st.integers(0, 5000), st.integers(0, 50), st.integers(0, 500))
def test_the_largest_size_fits_and_the_next_does_not(seed, mean, limit, smallest, guess):
    text = Counted(seed, mean)
    found = largest(text, limit, smallest, guess)
    if len(text(smallest)) > limit:
        assert found is None
        return
    size, best = found
    assert best == text(size) and size >= smallest
    assert len(best) <= limit < len(text(size + 1))


@given(st.integers(0, 99), st.integers(1, 40), st.integers(0, 2000), st.integers(0, 50))
def test_a_fitted_text_is_the_largest_in_its_own_tokens(seed, mean, limit, smallest):
    text = Counted(seed, mean)

    def encode(written):  # tokens of up to three letters
        return [0] * sum((len(word) + 2) // 3 for word in written.split())

    found = fitted(text, encode, limit, smallest)
    if len(encode(text(smallest))) > limit:
        assert found is None
        return
    size, ids = found
    assert ids == encode(text(size)) and len(ids) <= limit < len(encode(text(size + 1)))


def test_long_texts_are_tokenized_a_few_times():
    encoded = []

    def encode(written):
        encoded.append(written)
        return [0] * sum((len(word) + 2) // 3 for word in written.split())

    for seed in range(20):
        encoded.clear()
        fitted(Counted(seed, 20), encode, 20_000)
        assert sum(len(text) > 20_000 for text in encoded) <= 5


def test_sizes_that_add_nothing_end_the_search():
    assert largest(lambda size: "x" * (size // 5 * 5), 17, 0, 3)[0] == 19
