"""The reference's adapter: merged by peft, from tensors and settings that were read strictly here.

peft gets a configuration of our making, never the directory: from a file it would import modules by name, and read pickles. Each
layer is merged in float64 and rounded to the type that its weight has.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from trtllm_thoughtx.checkpoint.adapter import HEAD, PREFIX, Adapter
from trtllm_thoughtx.checkpoint.adapter_config import EMBEDDING
from trtllm_thoughtx.errors import ThoughtxError, listed, shown


def peft() -> Any:
    """The package. E201 without it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ImportError as error:
        raise ThoughtxError(
            "E201",
            "a reference with an adapter needs peft",
            where=f"import of {shown(error.name or 'peft')}",
            why="it is not installed here",
            fix='pip install "trtllm-thoughtx[reference]"',
        ) from error
    return peft


def merged(model: Any, adapter: Adapter) -> Any:
    """`model`, a transformers model, with the adapter merged. E103 where transformers holds modules of it in another form."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if unknown := [f"{name}.weight" for name in adapter.products if f"{name}.weight" not in names]:
        raise ThoughtxError(
            "E103",
            "transformers holds modules of the adapter in another form",
            where=adapter.where,
            why=listed(unknown),
            fix="compare engines of the merged checkpoint with --golden values that were recorded elsewhere",
        )
    if not adapter.tied and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name, stored in adapter.replaced.items():
            model.get_parameter(name).copy_(torch.from_numpy(adapter.read(stored)))
        ids, rows = adapter.replaced_rows()
        if rows is not None:
            table = model.get_parameter(f"{EMBEDDING}.weight")
            table[list(ids)] = torch.from_numpy(rows).to(table.dtype)
    return _with_products(model, adapter) if adapter.products else model


def _with_products(model: Any, adapter: Adapter) -> Any:
    library, config = peft(), adapter.config
    # Of a tied model peft would add the same product to the one matrix twice.
    modules = {part: name for part, (name, _, _) in adapter.products.items() if part != HEAD or not adapter.tied}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = library.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=list(modules),
            rank_pattern={name: config.rank_of(own) for name, own in modules.items()},
            alpha_pattern={name: config.alpha_of(own) for name, own in modules.items()},
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            lora_bias=config.lora_bias,
        )
        wrapped = library.get_peft_model(model, settings)
        tensors = {
            f"{PREFIX}{name}.{key}": torch.from_numpy(value) for name in modules for key, value in adapter.peft_tensors(name).items()
        }
        found = library.set_peft_model_state_dict(wrapped, tensors)
        assert not found.unexpected_keys, found.unexpected_keys
        for module in wrapped.modules():
            if isinstance(module, library.tuners.lora.LoraLayer):
                kind = module.weight.dtype
                module.double()
                module.merge()
                for tensor in module.parameters():
                    tensor.data = tensor.data.float().to(kind) if kind != torch.float64 else tensor.data
        return wrapped.merge_and_unload()
