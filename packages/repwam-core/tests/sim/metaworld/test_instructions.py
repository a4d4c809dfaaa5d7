"""Instructions: every task has some, the draw is by (task, seed), opposites differ in direction alone."""

import pytest
from repwam_core.sim.metaworld import TASKS, instruction, paraphrases

DIRECTIONS = {"open": "close", "right": "left"}


def test_every_task_has_several_sentences_of_its_own():
    assert len(TASKS) == 50
    every = [sentence for task in TASKS for sentence in paraphrases(task)]
    assert all(len(paraphrases(task)) >= 4 for task in TASKS)
    assert len(set(every)) == len(every)


def test_the_draw_depends_on_task_and_seed_alone():
    drawn = [instruction("faucet-open", seed) for seed in range(40)]
    assert drawn == [instruction("faucet-open", seed) for seed in range(40)]
    assert set(drawn) == set(paraphrases("faucet-open"))


def test_faucet_sentences_differ_in_the_direction_alone():
    for opened, closed in zip(paraphrases("faucet-open"), paraphrases("faucet-close"), strict=True):
        assert " ".join(DIRECTIONS.get(word, word) for word in opened.replace(":", " :").split()) == " ".join(
            closed.replace(":", " :").split()
        )


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="no instructions for task 'fly'"):
        paraphrases("fly")
