"""Which layers a config.json gives a sliding window -> the fields of an Architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megalign.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(config: Mapping[str, Any], layer_types: Sequence[str]) -> dict[str, Any]:
    """sliding_window and sliding_layers; `layer_types` are the family's when the config states none."""
    window, types = config.get("sliding_window"), config.get("layer_types") or layer_types
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise UserError(
            f"layer_types in config.json has {', '.join(unknown)}, which megalign does not compute; it has {FULL} and "
            f"{SLIDING}"
        )
    if len(types) != config["num_hidden_layers"]:
        raise UserError(
            f"layer_types in config.json names {len(types)} layers, num_hidden_layers={config['num_hidden_layers']}; "
            "name each layer once"
        )
    layers = frozenset(layer for layer, kind in enumerate(types) if kind == SLIDING)
    if layers and (window is None or window < 1):
        raise UserError(f"sliding_window={window} in config.json, but layer_types has {SLIDING}; set it to a length")
    return {"sliding_window": window, "sliding_layers": layers} if layers else {}


def all_sliding(config: Mapping[str, Any]) -> dict[str, Any]:
    """For the families whose layers are alike: all have the window, or none when it is null."""
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return read_windows({**config, "layer_types": None}, [kind] * config["num_hidden_layers"])


def qwen_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's: switched on by use_sliding_window, for the layers from max_window_layers on."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config["num_hidden_layers"] if window is None else config.get("max_window_layers", 28)
    types = [SLIDING if layer >= first else FULL for layer in range(config["num_hidden_layers"])]
    return read_windows({**config, "sliding_window": window}, types)
