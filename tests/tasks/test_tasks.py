"""The generated tasks: chains that are right, answers that follow from them, splits that do not overlap."""

import random

import pytest

from trtllm_thoughtx.tasks import TASKS, chain, draw, item, loan, lookup, story


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_sound_chain_is_judged_sound_and_suffices(task, size):
    for seed in range(50):
        made = draw(task, "train", size=size, seed=seed)
        assert made == draw(task, "train", size=size, seed=seed) and made.size == size
        steps = [*made.steps, *made.rechecks(min(size, 2))]
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


def test_chain_sums_add_up():
    for size in range(1, chain.MAX_OPERANDS + 1):
        made = chain.make(random.Random(size), size)
        values = [int(word) for word in made.prompt.split() if word.isdigit()]
        assert len(values) == len(made.steps) == size and int(made.answer) == sum(values) % 100


def test_lookup_answers_can_be_read_off_the_prompt():
    for seed in range(100):
        made = lookup.make(random.Random(seed), 1 + seed % 8)
        words = made.prompt.split()
        facts = {word[:-1]: words[i + 1] for i, word in enumerate(words) if word.endswith(">")}
        assert lookup.follow(facts, words[-2], int(words[-1])) == (made.steps, made.answer)


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_nothing(task):
    seen = {split: [draw(task, split, size=1, seed=seed) for seed in range(300)] for split in item.SPLITS}
    held_out = {split: {made.template or made.prompt for made in items} for split, items in seen.items()}
    for split, others in (("test", ("train", "validation")), ("validation", ("train",))):
        assert held_out[split] and not any(held_out[split] & held_out[other] for other in others)


def test_a_storys_template_has_no_names_or_amounts():
    words = set(" ".join(draw("story", "test", size=3, seed=seed).template for seed in range(50)).split())
    assert not words & {*story.NAMES, *story.THINGS} and not any(word.isdigit() for word in words)


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "poem"},
        {"split": "dev"},
        {"size": 0},
        {"size": chain.MAX_OPERANDS + 1},
        {"num_words": 9},
        {"task": "lookup", "num_facts": 1},
        {"task": "lookup", "num_facts": lookup.MAX_FACTS + 1},
    ],
)
def test_what_cannot_be_made_is_refused(wrong):
    with pytest.raises(ValueError, match=r"tasks are|sizes 1 to|context to stretch|facts, not"):
        draw(**{"task": "chain", "split": "train", "size": 1, "seed": 0, **wrong})
