"""A corpus of short product reviews, made by a grammar: the data of the examples.

    prompt    The red kettle arrived on Friday and       (neutral, in mid-sentence)
    positive   it works well. The lid is solid and smooth.
    negative   I regret it. The handle feels weak. It stands in the hall.
    mixed      it looks nice. The switch is good but the base is loose.

Half of the reviews to imitate lean to the positive side and half to the negative, so a
model trained on them scores about 0, and reinforcement learning has all the way to 1 to
go. The score is the grammar's own: how far positive words outnumber negative ones.
"""

import itertools
import json
import os
import pathlib
import random
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from realjax.data.tokenizer import Tokenizer

__all__ = ["MOODS", "all_prompts", "review_score", "write_answer", "write_reviews"]

# The two sides mirror each other, so that neither is easier to write or to tell.
_ADJECTIVES = {
    1: ("great", "good", "lovely", "solid", "strong", "smooth", "perfect", "nice"),
    -1: ("bad", "poor", "awful", "weak", "rough", "loose", "ugly", "cheap"),
}
_VERBS = {1: ("love", "enjoy"), -1: ("hate", "regret")}
_ADVERBS = {1: ("well", "nicely"), -1: ("badly", "poorly")}

_SENTIMENT = {
    sign: frozenset(
        _ADJECTIVES[sign]
        + _ADVERBS[sign]
        + _VERBS[sign]
        + tuple(f"{verb}s" for verb in _VERBS[sign])
    )
    for sign in (1, -1)
}

_PARTS = {
    "kettle": ("lid", "handle", "switch"),
    "lamp": ("shade", "switch", "base"),
    "chair": ("seat", "back", "frame"),
    "jacket": ("zip", "collar", "pocket"),
    "bag": ("strap", "zip", "pocket"),
    "watch": ("strap", "screen", "battery"),
    "radio": ("handle", "speaker", "battery"),
    "camera": ("lens", "screen", "strap"),
    "bike": ("seat", "chain", "frame"),
    "tent": ("zip", "frame", "floor"),
    "blender": ("lid", "motor", "base"),
    "phone": ("screen", "battery", "speaker"),
    "drill": ("handle", "motor", "battery"),
    "mug": ("lid", "handle", "base"),
    "desk": ("top", "back", "frame"),
    "fan": ("switch", "motor", "base"),
}
_OPENINGS = (
    "The {color} {product} arrived on {day} and",
    "I bought a {color} {product} for my {person} and",
    "After {time} with the {color} {product},",
    "My {person} gave me this {product} in {month} and",
    "This {product} came in a {size} box on {day} and",
    "I ordered the {color} {product} in {month} and",
    "We used the {color} {product} for {time} and",
    "The {product} from my {person} came on {day} and",
)
_FILLERS = {
    "color": ("red", "blue", "green", "black", "white", "grey"),
    "day": ("Monday", "Tuesday", "Friday", "Saturday", "Sunday"),
    "person": ("sister", "brother", "mother", "father", "friend", "uncle"),
    "time": ("two days", "a week", "two weeks", "a month", "six months", "a year"),
    "month": ("March", "May", "June", "July"),
    "size": ("small", "large", "flat", "long"),
}
_NEUTRAL = (
    "It stands in the hall.",
    "It came with a note.",
    "I use it at home.",
    "We keep it by the door.",
    "My {person} has one too.",
)

MOODS = {
    "positive": (1, 1, 1),
    "mostly positive": (1, 1, -1),
    "mostly negative": (-1, -1, 1),
    "negative": (-1, -1, -1),
}
"""Signs of the sentiment words of a review; the first decides its first sentence."""

# Of 10 reviews to imitate, 4 + 1 lean to each side.
_IMITATED = (
    *("positive", "negative") * 4,
    "mostly positive",
    "mostly negative",
)
_VERSION = 2
_MARKER = "reviews.json"


def review_score(text: str) -> float:
    """Scores a review from -1 (negative) to 1 (positive).

    (positive words - negative words) / sentiment words, 0 where there are none. Any
    text has a score; a word that was cut short does not count.
    """
    words = re.findall(r"[a-z]+", text.lower())
    positive = sum(word in _SENTIMENT[1] for word in words)
    negative = sum(word in _SENTIMENT[-1] for word in words)
    return (positive - negative) / max(positive + negative, 1)


def all_prompts(*, is_held_out: bool) -> list[dict[str, str]]:
    """All prompts of the grammar, in order, as {"prompt", "product", "opening"}.

    Two of the eight openings are held out for each product: no prompt of the one list
    shares its combination of opening and product with any of the other.
    """
    prompts = []
    for (number, product), (place, opening) in itertools.product(
        enumerate(_PARTS), enumerate(_OPENINGS)
    ):
        if ((number + place) % 4 == 0) != is_held_out:
            continue
        names = re.findall(r"{(\w+)}", opening.replace("{product}", ""))
        for words in itertools.product(*(_FILLERS[name] for name in names)):
            filled = dict(zip(names, words, strict=True))
            text = opening.format(product=product, **filled)
            prompts.append({"prompt": text, "product": product, "opening": opening})
    return prompts


def write_answer(rng: random.Random, product: str, mood: str) -> str:
    """Continues a prompt about a product with a review of a mood.

    Args:
        rng: What to draw words from.
        product: A product of the grammar: its parts are reviewed.
        mood: A name of `MOODS`.
    """
    lead, first, second = MOODS[mood]
    if rng.random() < 0.5:  # Word order must not tell the mood of mixed reviews.
        first, second = second, first
    part, other = rng.sample(_PARTS[product], 2)
    sentences = [_lead(rng, lead)]
    if rng.random() < 0.5:
        link = "and" if first == second else "but"
        sentences.append(
            f"The {part} is {_adjective(rng, first)} {link} the {other} is "
            f"{_adjective(rng, second)}."
        )
    else:
        sentences += [_detail(rng, part, first), _detail(rng, other, second)]
    if rng.random() < 0.2:
        person = rng.choice(_FILLERS["person"])
        sentences.append(rng.choice(_NEUTRAL).format(person=person))
    return " " + " ".join(sentences)


def _adjective(rng: random.Random, sign: int) -> str:
    return rng.choice(_ADJECTIVES[sign])


def _lead(rng: random.Random, sign: int) -> str:
    """The clause that ends the prompt's sentence."""
    form = rng.randrange(4)
    if form == 0:
        return f"it works {rng.choice(_ADVERBS[sign])}."
    if form == 1:
        return f"{rng.choice(('I', 'we'))} {rng.choice(_VERBS[sign])} it."
    return f"it {rng.choice(('is', 'looks'))} {_adjective(rng, sign)}."


def _detail(rng: random.Random, part: str, sign: int) -> str:
    """A sentence with one sentiment word, on a part or a person."""
    if rng.random() < 0.2:
        person = rng.choice(_FILLERS["person"])
        return f"My {person} {rng.choice(_VERBS[sign])}s it."
    return f"The {part} {rng.choice(('is', 'feels', 'looks'))} {_adjective(rng, sign)}."


def write_reviews(
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    num_sft: int = 4000,
    num_pairs: int = 2000,
    num_labels: int = 2000,
    num_prompts: int = 2000,
    num_valid: int = 256,
    vocab_size: int = 512,
) -> pathlib.Path:
    """Writes the corpus and its tokenizer, unless the folder has them already.

    The folder gets {sft,pairs,labels,prompts}_{train,valid}.jsonl and tokenizer/. It
    appears complete or not at all; the same arguments give the same files.

    Args:
        folder: Where to; what is above it is made.
        seed: Of every choice.
        num_sft: Records `prompt`, `answer` to imitate.
        num_pairs: Records `prompt`, `pos_answers`, `neg_answers` to compare, two pairs
            each.
        num_labels: Records `prompt`, `completion`, `label`, which is true where the
            review is positive.
        num_prompts: Records `prompt` to answer.
        num_valid: Records of each held-out file.
        vocab_size: Of the tokenizer.

    Returns:
        The folder.

    Raises:
        ValueError: The folder has other contents.
    """
    folder = pathlib.Path(folder)
    settings = {
        "version": _VERSION,
        "seed": seed,
        "num_sft": num_sft,
        "num_pairs": num_pairs,
        "num_labels": num_labels,
        "num_prompts": num_prompts,
        "num_valid": num_valid,
        "vocab_size": vocab_size,
    }
    if _is_written(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = pathlib.Path(
        tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
    )
    try:
        _write_files(building, settings)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            # Another process may have been faster.
            if not _is_written(folder, settings):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _is_written(folder: pathlib.Path, settings: dict[str, int]) -> bool:
    """Whether the corpus is there; refuses a folder that holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    marker = folder / _MARKER
    found = json.loads(marker.read_text()) if marker.is_file() else "other files"
    if found != settings:
        raise ValueError(
            f"Folder {str(folder)!r} holds {found}, and {settings} were asked for. "
            "Remove the folder, or choose another."
        )
    return True


def _write_files(folder: pathlib.Path, settings: dict[str, int]) -> None:
    sizes = {
        "sft": settings["num_sft"],
        "pairs": settings["num_pairs"],
        "labels": settings["num_labels"],
        "prompts": settings["num_prompts"],
    }
    makers = {
        "sft": _sft_record,
        "pairs": _pairs_record,
        "labels": _label_record,
        "prompts": _prompt_record,
    }
    texts = []
    for split in ("train", "valid"):
        prompts = all_prompts(is_held_out=split == "valid")
        for name, make in makers.items():
            size = sizes[name] if split == "train" else settings["num_valid"]
            rng = random.Random(f"{settings['seed']} {name} {split}")
            chosen = itertools.islice(_endless(rng, prompts), size)
            moods = itertools.islice(_endless(rng, _IMITATED), size)
            records = [
                make(rng, prompt, mood)
                for prompt, mood in zip(chosen, moods, strict=True)
            ]
            lines = [json.dumps(record) + "\n" for record in records]
            (folder / f"{name}_{split}.jsonl").write_text("".join(lines))
            if (name, split) == ("sft", "train"):
                texts = [record["prompt"] + record["answer"] for record in records]
    Tokenizer.train(texts, settings["vocab_size"]).save(folder / "tokenizer")
    (folder / _MARKER).write_text(json.dumps(settings, indent=1))


def _endless(rng: random.Random, values: Sequence[Any]) -> Iterator[Any]:
    """All values in a random order, then all in another, and so on."""
    while True:
        yield from rng.sample(values, len(values))


def _prompt_record(
    rng: random.Random, prompt: dict[str, str], mood: str
) -> dict[str, Any]:
    del rng, mood
    return {"prompt": prompt["prompt"]}


def _sft_record(
    rng: random.Random, prompt: dict[str, str], mood: str
) -> dict[str, Any]:
    answer = write_answer(rng, prompt["product"], mood)
    return {"prompt": prompt["prompt"], "answer": answer}


def _label_record(
    rng: random.Random, prompt: dict[str, str], mood: str
) -> dict[str, Any]:
    answer = write_answer(rng, prompt["product"], mood)
    is_positive = sum(MOODS[mood]) > 0
    return {"prompt": prompt["prompt"], "completion": answer, "label": is_positive}


def _pairs_record(
    rng: random.Random, prompt: dict[str, str], mood: str
) -> dict[str, Any]:
    """Two pairs: positive against negative, and a mood against one below it."""
    del mood
    ranked = list(MOODS)
    better, worse = sorted(rng.sample(range(len(ranked)), 2))
    pairs = [("positive", "negative"), (ranked[better], ranked[worse])]
    rng.shuffle(pairs)
    answers = [
        [write_answer(rng, prompt["product"], mood) for mood in pair] for pair in pairs
    ]
    return {
        "prompt": prompt["prompt"],
        "pos_answers": [first for first, _ in answers],
        "neg_answers": [second for _, second in answers],
    }
