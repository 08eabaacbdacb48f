"""Tokenizers of the kinds that models come with, small: byte-level, byte fallback, word pieces, and one whose tags are several tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trtllm_thoughtx.text.chat import ChatTemplate
from trtllm_thoughtx.text.text import Text

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
CORPUS = ["the quick brown fox, don't panic: 12345 + 678", "Füße über Straßen", "数学は楽しい 🙂🙃", "user assistant system\n\n"] * 4
PIECES = ["</", "think", ">", "<", "a", "b", " ", ".", "\n", "\n\n", ".\n\n", ".</", ">\n", "\n\nNow", "b\n", "é"[:1], "/"]


def byte_level() -> Any:
    import tokenizers as t

    tokenizer = t.Tokenizer(t.models.BPE())
    tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = t.decoders.ByteLevel()
    trainer = t.trainers.BpeTrainer(vocab_size=330, initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def byte_fallback() -> Any:
    """As SentencePiece models come: metaspace, byte tokens, a leading space that decoding strips."""
    import tokenizers as t

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁▁", *"abcdehlo.", "▁h", "he", "▁he", "lo"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "▁"), ("▁", "h"), ("h", "e"), ("▁h", "e"), ("l", "o")]
    tokenizer = t.Tokenizer(t.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = t.normalizers.Sequence([t.normalizers.Prepend("▁"), t.normalizers.Replace(" ", "▁")])
    steps = [t.decoders.Replace("▁", " "), t.decoders.ByteFallback(), t.decoders.Fuse(), t.decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = t.decoders.Sequence(steps)
    tokenizer.post_processor = t.processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_piece() -> Any:
    import tokenizers as t

    tokenizer = t.Tokenizer(t.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3, "##d": 4, ".": 5}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = t.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = t.decoders.WordPiece()
    return tokenizer


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_piece": word_piece}
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False},
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 1000000000000000019884624838656,
}


def one_token_text() -> Text:
    """A letter is a token, and so is each tag, which is special."""
    words = {word: i for i, word in enumerate(["<eos>", "<think>", "</think>", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.add_special_tokens(["<eos>", "<think>", "</think>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return Text(tokenizer, "test", special={"eos_token": "<eos>"})


def several_token_text() -> Text:
    """A tokenizer like byte-level BPE: decoding concatenates, tags are three tokens, and their ends may join their neighbours."""
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*PIECES, "<eos>"]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    template = ChatTemplate("{{ messages[0].content }}<think>", "test")
    text = Text(tokenizer, "test", templates={"default": template})
    ids = {piece: vocabulary[piece] for piece in vocabulary}
    text.encode = lambda word, add_special=True: greedy(word, ids)  # type: ignore[method-assign]
    return text


def greedy(word: str, ids: dict[str, int]) -> list[int]:
    """Longest piece first, as BPE would have it."""
    found = []
    while word:
        piece = max((p for p in ids if word.startswith(p)), key=len)
        found.append(ids[piece])
        word = word[len(piece) :]
    return found
