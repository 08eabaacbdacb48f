"""The generated tasks: chains that are right, answers that follow from them, splits that do not overlap."""

import random

import pytest

from trtllm_thoughtx.tasks import chain, item, loan, lookup, story

MAKERS = {"chain": chain.make, "lookup": lookup.make, "story": story.make, "loan": loan.make}


@pytest.mark.parametrize("task", MAKERS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_sound_chain_is_judged_sound_and_suffices(task, size):
    for seed in range(50):
        made = MAKERS[task](random.Random(seed), size)
        assert made == MAKERS[task](random.Random(seed), size)
        steps = [*made.steps, *made.rechecks(2, random.Random(seed))]
        assert item.steps_of(item.thought(steps)) == steps
        assert item.coherence(made, steps) == 1
        assert made.answer_after(len(made.steps)) == made.answer
        wrong = [*made.steps[:-1], made.steps[-1] + "x"]
        assert item.coherence(made, wrong) < 1
        assert made.num_sufficient <= len(made.steps)


def test_a_thought_cut_short_has_no_answer():
    made = chain.make(random.Random(0), 3)
    assert [made.answer_after(n) for n in range(4)] == [item.UNKNOWN] * 3 + [made.answer]


@pytest.mark.parametrize("size", range(1, 5))
def test_loan_answers_follow_from_the_rules(size):
    for seed in range(200):
        made = loan.make(random.Random(seed), size)
        verdicts = [step.endswith(" yes") for step in made.steps]
        for step in made.steps:
            value, sign, bound, verdict = step.split()[3:]
            assert (verdict == "yes") == (int(value) > int(bound) if sign == ">" else int(value) < int(bound))
        assert made.answer == (loan.APPROVED if all(verdicts) else f"{loan.DENIED} rule {verdicts.index(False) + 1}")


def test_story_sums_stay_within_two_digits_and_add_up():
    for seed in range(300):
        made = story.make(random.Random(seed), 1 + seed % 4)
        for step in made.steps:
            _, a, sign, b, _, c = step.split()
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) and 0 <= int(c) <= 99


def test_lookup_stretches_to_the_length_asked_for():
    made = lookup.make(random.Random(0), 3, num_words=1024)
    assert 1000 < made.traits["num_words"] <= 1024 and made.traits["distance"] <= made.traits["num_words"]


def test_splits_share_no_prompt():
    assert {item.split_of(str(i)) for i in range(100)} == set(item.SPLITS)
