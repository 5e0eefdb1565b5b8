"""The rollout engine: what slots, pages and sharing gain, and what they cost.

    python -m realjax.bench.rollout
    python -m realjax.bench.rollout --hf_python=ENVIRONMENT/bin/python --sections=hf
    python -m realjax.bench.rollout --model=8b --sections=equal,roofline   # on a GPU

Sections, each with its claim:

    lengths       log-normal lengths: slots that are refilled, against the same engine
                  with batches, and against one compiled loop for each batch
    sharing       several completions of a prompt, prefilled once or once for each
    equal         equal lengths: the engine against one compiled loop
    host          time of Python for a step, beyond what it waits for the device
    hf            beside Hugging Face `generate` on the same weights; needs --hf_python
    compilations  none, after a warm-up, whatever comes
    roofline      decode steps as shares of the bandwidth of the device's memory

The model is that of `realjax.bench.quick` with random parameters, on one device. All
sides of a comparison sample the same tokens; that is checked before they are timed, in
turn. The last line is one JSON object: medians, and the spread over the repetitions.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from realjax.bench import rollout_sections
from realjax.bench.environment import describe
from realjax.bench.hf_rival import beside_hf
from realjax.bench.rollout_options import SECTIONS, Options, parse
from realjax.bench.rollout_subject import Subject
from realjax.bench.roofline import roofline

_MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "lengths": rollout_sections.lengths,
    "sharing": rollout_sections.sharing,
    "equal": rollout_sections.equal,
    "host": rollout_sections.host,
    "hf": beside_hf,
    "compilations": rollout_sections.recompilations,
    "roofline": roofline,
}


def measure(options: Options) -> dict[str, Any]:
    """Measure every section asked for, and print its figures."""
    subject = Subject(options)
    found = {}
    for name in SECTIONS:
        if name in options.sections:
            found[name] = _MEASURES[name](subject)
            print(f"{name}\n{_lines(found[name])}\n", flush=True)
    return found


def _lines(found: dict[str, Any], indent: str = "    ") -> str:
    """Figures by name, a line each."""
    lines = []
    for name, value in found.items():
        match value:
            case {"median": median, "min": least, "max": most}:
                lines.append(f"{indent}{name}  {median:g}  ({least:g} to {most:g})")
            case dict():
                lines += [f"{indent}{name}", _lines(value, indent + "    ")]
            case [dict(), *_]:
                lines += [f"{indent}{name}"]
                lines += [_lines(one, indent + "    ") + "\n" for one in value]
            case _:
                lines.append(f"{indent}{name}  {value}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then one line of JSON."""
    options = parse(arguments, (__doc__ or "").partition("\n")[0])
    result = {
        "bench": "rollout",
        **describe(),
        "model": options.model_name,
        "parameters": options.model.num_parameters,
        "dtype": options.dtype,
        "repetitions": options.repetitions,
        "engine": options.engine,
    }
    print(json.dumps(result | measure(options)))


if __name__ == "__main__":
    main()
