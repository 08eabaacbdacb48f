"""A base for `thoughtx-distill --lora_rank`: a real model whose tokenizer has thinking tags, and traces to learn from.

    python bench/real/reasoning_base.py --model_dir SMOLLM2 --output_dir BASE [--num_traces 4000 --seed 0]

Two reserved tokens of the vocabulary, which neither the chat template nor the settings name, become <think> and </think>, so no matrix
grows; the chat template opens the thinking. The weights are those of the model. `traces.jsonl` beside them holds word problems, loan
cases, chains of sums and look-ups of 1 to 8 steps, drawn by seed from the training set of the generated tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

from trtllm_thoughtx.tasks import TASKS, draw
from trtllm_thoughtx.text.tokens import THINK_TAGS

BEGIN, END = THINK_TAGS[0]
OPENS = "{% if add_generation_prompt %}"


def reserved(tokenizer: dict, config: str, template: str) -> list[dict]:
    """The special tokens that nothing names, the last first."""
    found = [one for one in tokenizer["added_tokens"] if one["special"] and one["content"] not in config and one["content"] not in template]
    return sorted(found, key=lambda one: -one["id"])


def make_base(model_dir: Path, output_dir: Path, num_traces: int, seed: int) -> None:
    output_dir.mkdir()
    for path in model_dir.iterdir():
        if path.is_file():
            shutil.copyfile(path, output_dir / path.name)
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    template = (model_dir / "chat_template.jinja").read_text()
    spare = reserved(tokenizer, (model_dir / "tokenizer_config.json").read_text(), template)[:2]
    if len(spare) < 2 or OPENS not in template:
        raise SystemExit("the tokenizer has no two reserved tokens, or the chat template opens no answer")
    for one, tag in zip(reversed(spare), (BEGIN, END), strict=True):
        vocabulary = tokenizer["model"]["vocab"]
        if one["content"] in vocabulary:
            vocabulary[tag] = vocabulary.pop(one["content"])
        one |= {"content": tag, "special": False}
    (output_dir / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    head, _, tail = template.rpartition("{% endif %}")
    (output_dir / "chat_template.jinja").write_text(f"{head}{{{{ '{BEGIN}\\n' }}}}{{% endif %}}{tail}")
    rng = random.Random(f"traces {seed}")
    with (output_dir / "traces.jsonl").open("w") as file:
        for _ in range(num_traces):
            task = rng.choice(list(TASKS))
            made = draw(task, "train", size=rng.randint(1, min(8, TASKS[task][1])), seed=rng.getrandbits(48))
            file.write(json.dumps({"prompt": made.prompt, "steps": list(made.steps), "answer": made.answer}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_traces", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    make_base(asked.model_dir, asked.output_dir, asked.num_traces, asked.seed)
