"""Our sampling parameters -> vLLM's; which of its own a run may name in generation_kwargs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from megalign.errors import UserError
from megalign.rollout.engine import GenerationParams

_FIELDS_OF_THEIR_OWN = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_completion_length",
    "n": "num_generations",
    "structured_outputs": "vllm_structured_outputs_regex",
    "seed": "seed",
}
_ENGINES_OWN = {"logprobs", "prompt_logprobs", "detokenize", "output_kind", "flat_logprobs", "skip_clone"}
# Values of one of these end a completion, or change it, in a way that Completion has no word for.
_REFUSED = {
    "repetition_detection": "stop, max_completion_length and repetition_penalty bound a completion",
    "trace_decode_token_ids": "completions are sampled, not given",
}


def sampling_params(vllm: Any, params: GenerationParams, seed: int) -> Any:
    """vLLM's SamplingParams of these; UserError where vLLM refuses them."""
    assert seed >= 0, f"seed {seed}: vLLM takes -1 for no seed"
    regex = params.structured_outputs_regex
    structured = None
    if regex is not None:
        structured = vllm.sampling_params.StructuredOutputsParams(regex=regex)
    extra = dict(params.extra)
    check_names(extra, vllm)
    stop_token_ids = [*params.stop_token_ids, *extra.pop("stop_token_ids", [])]
    try:
        return vllm.SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            min_p=params.min_p or 0.0,
            repetition_penalty=params.repetition_penalty,
            structured_outputs=structured,
            stop_token_ids=stop_token_ids,
            seed=seed,
            logprobs=0,  # the sampled token's, and no other
            detokenize="stop" in extra,
            **extra,
        )
    except (ValueError, TypeError, vllm.exceptions.VLLMValidationError) as error:
        raise UserError(f"vLLM refuses the sampling parameters: {' '.join(str(error).split())}") from error


def check_names(extra: Iterable[str], vllm: Any) -> None:
    """generation_kwargs may name any field of vLLM's SamplingParams that is not somebody else's."""
    known = {name for name in vllm.SamplingParams.__struct_fields__ if not name.startswith("_")}
    for name in extra:
        if name in _FIELDS_OF_THEIR_OWN:
            raise UserError(f"generation_kwargs[{name!r}] has a field of its own; set {_FIELDS_OF_THEIR_OWN[name]}")
        if name in _ENGINES_OWN:
            raise UserError(f"generation_kwargs[{name!r}] is set by the rollout engine; leave it out")
        if name in _REFUSED:
            raise UserError(f"generation_kwargs[{name!r}] is refused: {_REFUSED[name]}; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}?" if near else "see vLLM's documentation of SamplingParams"
            raise UserError(f"generation_kwargs[{name!r}] is not a field of vLLM's SamplingParams; {meant}")
