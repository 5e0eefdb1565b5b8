"""Text to token ids and back: a thin wrapper of a fast Hugging Face tokenizer.

Only what a run needs is offered, and only one meaning of each: `encode` never adds
special tokens, sequences end with `eos_id`, and nothing is ever told from pad ids, so
a tokenizer whose padding token is its end-of-sequence token works like any other.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Message", "Tokenizer"]

Message = Mapping[str, str]
"""One turn of a conversation: {"role": ..., "content": ...}."""

NUM_BYTES = 256


class Tokenizer:
    """A tokenizer; make one with `load` or `train`.

    Attributes:
        eos_id: Ends every sequence that was not cut short.
        eos_ids: All ids that end a completion, `eos_id` first.
        pad_id: Fills places without a token; the tokenizer's own, or `eos_id`.
    """

    def __init__(self, fast: "PreTrainedTokenizerFast", eos_ids: Sequence[int]):
        if not eos_ids:
            raise ValueError(
                "The tokenizer has no end-of-sequence token. Set `eos_token` in its "
                "tokenizer_config.json: completions could never end."
            )
        self._fast = fast
        # Some folders were saved with the settings of somebody's batch.
        fast.backend_tokenizer.no_truncation()
        fast.backend_tokenizer.no_padding()
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.eos_id = self.eos_ids[0]
        pad_id = fast.pad_token_id
        self.pad_id = int(pad_id) if isinstance(pad_id, int) else self.eos_id

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads the tokenizer of a Hugging Face folder.

        Raises:
            FileNotFoundError: There is no folder, or no tokenizer.json in it.
            ValueError: Its files are broken, or name no end-of-sequence token.
        """
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no tokenizer folder {str(folder)!r}. Give the folder of a "
                "checkpoint, or of a tokenizer saved with `save`."
            )
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"Folder {str(folder)!r} has no tokenizer.json. Save the fast version "
                "of its tokenizer there, with `save_pretrained` of transformers."
            )
        try:
            fast = _fast_tokenizer_class().from_pretrained(str(folder))
            eos_ids = _generation_eos_ids(folder / "generation_config.json")
        # The reader of tokenizer.json raises plain Exceptions.
        except Exception as error:
            raise ValueError(
                f"The tokenizer in {str(folder)!r} cannot be read: {error}. "
                "Copy its tokenizer files again."
            ) from error
        own = fast.eos_token_id
        own = [own] if isinstance(own, int) else []
        try:
            return cls(fast, [*own, *eos_ids])
        except ValueError as error:
            raise ValueError(f"Folder {str(folder)!r}: {error}") from None

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        special: Sequence[str] = ("<eos>", "<pad>"),
        chat_template: str = "",
    ) -> "Tokenizer":
        """Trains a byte-level byte-pair encoding.

        Args:
            texts: What to find frequent pairs in.
            vocab_size: Exactly this many ids; a corpus that yields fewer is filled up
                with `<unused0>`, `<unused1>`, ...
            special: Special tokens; the first ends sequences, the second, if there is
                one, is padding. They take the ids 0, 1, ...
            chat_template: Jinja template of conversations.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        fewest = NUM_BYTES + len(special)
        if not special or vocab_size < fewest:
            raise ValueError(
                f"A vocabulary of {vocab_size} cannot hold {NUM_BYTES} bytes and the "
                f"special tokens {list(special)}. Give at least one special token and "
                f"a `vocab_size` of at least {fewest}."
            )
        encoding = tokenizers.Tokenizer(models.BPE())
        encoding.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        encoding.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        encoding.train_from_iterator(texts, trainer)
        missing = vocab_size - encoding.get_vocab_size()
        encoding.add_tokens([f"<unused{i}>" for i in range(missing)])
        fast = _fast_tokenizer_class()(
            tokenizer_object=encoding,
            eos_token=special[0],
            pad_token=special[1] if len(special) > 1 else None,
            clean_up_tokenization_spaces=False,
            chat_template=chat_template or None,
        )
        return cls(fast, [0])  # The trainer puts special tokens first.

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._fast)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self._fast.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special tokens are added."""
        return self._fast.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        encode = self._fast.backend_tokenizer.encode_batch_fast
        return [found.ids for found in encode(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._fast.backend_tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> str:
        """Text of a conversation by the chat template.

        Args:
            messages: The turns, in order.
            add_generation_prompt: Whether to end with the opening of the next answer.
        """
        if not self.has_chat_template:
            raise ValueError(
                "The tokenizer has no chat template, and the data holds conversations. "
                "Use a tokenizer that has one, or give prompts and answers as text."
            )
        try:
            text = self._fast.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except ImportError:
            raise
        # Templates raise their own errors, such as "roles must alternate".
        except Exception as error:
            raise ValueError(
                f"The chat template refuses the conversation {messages}: {error}. "
                "Correct the record, or use another tokenizer."
            ) from error
        return str(text)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[int]:
        """Token ids of a conversation by the chat template."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text)

    def save(self, folder: str | os.PathLike):
        """Writes the tokenizer's files into a folder, beside what is there.

        Further end-of-sequence ids have their place in generation_config.json, which
        is written only where they are needed and the folder has none yet.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._fast.save_pretrained(str(folder))
        generation = folder / "generation_config.json"
        if len(self.eos_ids) > 1 and not generation.exists():
            generation.write_text(json.dumps({"eos_token_id": list(self.eos_ids)}))

    def fingerprint(self) -> str:
        """A hash that is equal for tokenizers that give the same ids to every text."""
        parts = json.loads(self._fast.backend_tokenizer.to_str())
        # These change how a caller's batch is cut or framed, never what ids mean.
        for name in ("truncation", "padding", "post_processor"):
            parts.pop(name, None)
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _fast_tokenizer_class() -> "type[PreTrainedTokenizerFast]":
    """Imports transformers late: it takes a second, and most programs read no text."""
    # It advises to install PyTorch, which its tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def _generation_eos_ids(path: pathlib.Path) -> list[int]:
    """End-of-sequence ids of a generation_config.json: one, several or none."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text()).get("eos_token_id")
    if found is None:
        return []
    return [int(found)] if isinstance(found, int) else [int(i) for i in found]
