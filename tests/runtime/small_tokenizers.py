"""Tokenizers of the kinds there are, made in moments."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from realjax.data.tokenizer import Tokenizer

CORPUS = ["the cat sat on the mat", "a good day, a bad day", "Größe 5 €", "\n\nQ: why?"]


def of_words(encoding: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=encoding, eos_token="</s>"), [0]
    )


def byte_level() -> Tokenizer:
    """As GPT-2's, Llama 3's and Qwen's: characters may be spread over tokens."""
    return Tokenizer.train(CORPUS * 9, 300, special=("</s>",))


def metaspace() -> Tokenizer:
    """As Llama 2's and Gemma's: a space before every text, bytes for rare letters."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    trained.train_from_iterator(["the cat sat", "a good day, a bad day"] * 9, trainer)
    tokens = ["</s>", "<unk>", *byte_tokens, *trained.get_vocab()]
    pieces = trained.get_vocab()
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (left, right)
        for whole in sorted(pieces, key=pieces.get)
        for left, right in [(whole[:i], whole[i:]) for i in range(1, len(whole))]
        if left in pieces and right in pieces
    ]
    encoding = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    )
    encoding.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    encoding.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    encoding.add_special_tokens(["</s>", "<unk>"])
    return of_words(encoding)


def letters_only() -> Tokenizer:
    """A vocabulary that cannot write most characters."""
    vocabulary = {token: i for i, token in enumerate(["</s>", "<unk>", *"abc "])}
    encoding = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    encoding.decoder = decoders.Fuse()
    encoding.add_special_tokens(["</s>", "<unk>"])
    return of_words(encoding)
