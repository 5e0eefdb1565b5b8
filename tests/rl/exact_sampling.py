"""What `realjax/rl/sampling.py` should compute, from the definitions, with NumPy.

Everything is float64 and sorted, one row after the other.
"""

import numpy as np

from realjax.rl.sampling import History, Sampling


def probabilities(
    logits, config: Sampling, forbidden=None, history: History | None = None
) -> np.ndarray:
    """Return the probability of each token of each row, [B, V]."""
    logits = np.float64(logits)
    if config.repetition_penalty != 1:
        factor = np.where(
            logits < 0, config.repetition_penalty, 1 / config.repetition_penalty
        )
        seen = np.asarray(history.in_prompt_or_completion)
        logits = np.where(seen, logits * factor, logits)
    if config.presence_penalty:
        logits = logits - config.presence_penalty * np.asarray(history.in_completion)
    if forbidden is not None:
        logits = np.where(np.asarray(forbidden), -np.inf, logits)
    logits = logits / config.temperature
    return np.stack([_truncated(_softmax(row), config) for row in logits])


def entropies(p: np.ndarray) -> np.ndarray:
    """Return the entropy of each row, in nats."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)


def forbidden_tokens(
    config: Sampling, prompt, completion, eos: int, vocab_size: int
) -> np.ndarray:
    """Return what may not follow a completion: [V]."""
    tokens, forbidden = [*prompt, *completion], np.zeros(vocab_size, bool)
    for *before, last in config.bad_words:
        if tokens[len(tokens) - len(before) :] == before:
            forbidden[last] = True
    if len(completion) < config.min_new_tokens:
        forbidden[eos] = True
    return forbidden


def _softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _truncated(p, config: Sampling):
    """Return one row's distribution after top-k, top-p and min-p."""
    if config.greedy:
        return p
    order, kept = np.argsort(-p, kind="stable"), p > 0
    if config.top_k:
        kept[order[config.top_k :]] = False
    if config.top_p < 1:
        mass = p if config.union else p * kept / np.sum(p * kept)
        before = np.cumsum(mass[order]) - mass[order]
        kept[order[before >= config.top_p]] = False
    left = p * kept
    left[left < config.min_p * left.max()] = 0
    return left / left.sum()
