"""A rollout over several processes, for `processes_test.py`."""

from realjax.runtime import cluster
from tests.rollout import sampled_test as one


def sample(place, num_pages, has_stops):
    """Tokens, lengths and work of a rollout on the devices of all processes."""
    engine = one.engine_of(place, is_read=has_stops)
    options = {"on_tokens": stop_at_fifties} if has_stops else {}
    with one.host_settings(engine, num_pages):
        rows, keep = range(7), engine.room.num_pages
        inputs = one.inputs_of(
            [one.PROMPTS[row] for row in rows],
            one.IDS[list(rows)],
            longest=one.LONGEST,
            place=place,
        )
        rollout = engine(
            one.parameters_at(one.CONFIG, place),
            inputs,
            one.KEY(),
            completions_per_prompt=one.GROUP,
            **options,
        )
    found = cluster.fetch(rollout._asdict(), "rollout")
    assert found is not None
    return {
        "tokens": found["tokens"].tolist(),
        "lengths": found["lengths"].tolist(),
        "logprobs": found["old_logprobs"].tolist(),
        "num_pages": keep,
        "num_preempted": engine.work.num_preempted,
        "num_launches": engine.work.num_launches,
    }


def stop_at_fifties(row, new):
    """End a row after two tokens where one from 50 on is seen."""
    del row
    return 2 if max(new.ids) >= 50 else None
