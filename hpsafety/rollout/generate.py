"""model.generate: the engine, for prompts that are all there."""

from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.sampler import Rollout, Settings, stop_ids


def generate(
    model, prompts, k=1, max_new_tokens=64, temperature=1.0, top_p=1.0, top_k=0, seed=0, stop=None
) -> list[Rollout]:
    """k Rollouts per prompt, in order of (prompt, sample). temperature 0 is greedy.

    prompts  lists of token ids; stop  token ids that end a response, None for the model's end-of-turn and eos ids
    Raises ValueError for an empty prompt, one that exceeds the context, or a setting out of range; RunError, naming the
    prompt, for weights that give NaN; InputError where a quarter of the free memory holds not one sequence.
    """
    if k < 1:
        raise ValueError(f"generate: k must be at least 1, got {k}")
    settings = Settings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
        stop=stop_ids(model) if stop is None else frozenset(stop),
    )  # fmt: skip
    engine = Engine(model, settings)
    for index, prompt in enumerate(prompts):
        engine.add(Request(list(prompt), k, index))
    return sorted(engine.rollouts(()), key=lambda r: (r.prompt_index, r.sample_index))
