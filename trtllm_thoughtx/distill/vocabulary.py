"""The samples' word-level tokenizer: every word of the generated tasks is one token, every digit is one token.

Numbers are split into digits so that sums can be computed digit by digit; the blank line that ends a step is one token, as
it is in the vocabularies of real models.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from trtllm_thoughtx.tasks import chain, loan, lookup, story
from trtllm_thoughtx.tasks.item import BOUNDARY, RECHECK, UNKNOWN

PAD, EOS, THINK, END_THINK, QUESTION = "<pad>", "<eos>", "<think>", "</think>", "Q"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)
_CORE = (PAD, EOS, THINK, END_THINK, QUESTION, BOUNDARY, UNKNOWN, RECHECK, "=", "+", "-", ">", "<", ";", ":", ".", ",")


def words() -> list[str]:
    """Every token, in the order of its id."""
    forms = [*story.STARTS, *story.GAINS.values(), *story.LOSSES.values(), *story.ASIDES, *story.QUESTIONS, *loan.ASIDES]
    told = {word for form in forms for word in form.split() if not word.startswith("{")}
    told |= {*story.NAMES, *story.THINGS, *story.GAINS, *story.LOSSES, *loan.FIELDS, *lookup.ADJECTIVES, *lookup.NOUNS, *lookup.VERBS}
    told |= {*chain.OPERANDS, *lookup.NODES, *lookup.KEYS.values(), "loan", "for", "rule", "yes", "no", loan.APPROVED, loan.DENIED, "the"}
    return [*_CORE, *"0123456789", *sorted(told - {*_CORE, *"0123456789"})]


def build() -> Tokenizer:
    """A `tokenizers.Tokenizer`; an unknown word becomes `<pad>`, which no task contains."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token=PAD))
    number = pre_tokenizers.Split(Regex(r"(?<![a-z0-9])[0-9]+"), "isolated")
    digit = pre_tokenizers.Split(Regex(r"(?<![a-z][0-9]?)[0-9]"), "isolated")
    blanks = pre_tokenizers.Split(Regex(r" +"), "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(BOUNDARY, "isolated"), blanks, number, digit])
    spaced = decoders.Replace(Regex(r"\A"), " ")
    numbers = decoders.Replace(Regex(r"(?<=\b[0-9]) (?=[0-9]\b)"), "")
    tokenizer.decoder = decoders.Sequence([spaced, decoders.Fuse(), numbers, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([PAD, EOS])
    return tokenizer
