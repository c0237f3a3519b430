"""Seeds of completions."""

from __future__ import annotations

from megalign.trainers.sampling import Place, completion_seeds


def test_seeds_are_a_function_of_the_place_in_the_run() -> None:
    seeds = completion_seeds(42, Place("train", 7), 16)
    assert len(set(seeds)) == 16 and min(seeds) >= 0
    assert completion_seeds(42, Place("train", 7), 8) == seeds[:8]
    others = [(43, Place("train", 7)), (42, Place("eval", 7)), (42, Place("train", 8)), (42, Place("train", 7, 1))]
    assert all(set(completion_seeds(*other, 16)).isdisjoint(seeds) for other in others)
