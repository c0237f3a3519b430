"""Virtual chunks, Transformer Engine's names and stages without layers, on stand-ins with those names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import architecture_of, rules_of
from megalign.conversion.hf_files import read_config
from megalign.conversion.names import numbered
from megalign.conversion.rules import expand, shard_shape
from megalign.resharding.export import gathered
from megalign.resharding.load import load_hf
from tests.layouts import Layout, groups_of
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.megatron

FUSED = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


class Chunk(nn.Module):
    """The parameters of some consecutive layers, numbered from 0 as Megatron's chunks number them."""

    def __init__(self, architecture: Architecture, layers: range, outer: tuple[str, ...], tp_size: int) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(nn.Module() for _ in layers)
        for number, layer in zip(layers, self.decoder.layers, strict=True):
            layer.layer_number = number + 1
        for rule, key in expand(rules_of(architecture), architecture):
            if key.indices[0] in layers if rule.per_layer else rule.megatron in outer:
                name = numbered(rule.megatron, tuple(number - layers.start for number in key.indices))
                for plain, fused in FUSED.items():
                    name = name.replace(plain, fused)
                self._place(name, torch.full(shard_shape(rule, architecture, tp_size), float("nan")))

    def _place(self, name: str, value: torch.Tensor) -> None:
        *path, last = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(value))


# (layers, other tensors) of each chunk of each of two stages.
EMBEDDING, NORM, HEAD = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
ARRANGEMENTS = {
    "virtual": [
        [(range(0, 1), (EMBEDDING,)), (range(2, 3), ())],
        [(range(1, 2), ()), (range(3, 4), (NORM, HEAD))],
    ],
    "uneven": [[(range(0, 3), (EMBEDDING,))], [(range(3, 4), (NORM, HEAD))]],
    "no layers": [[(range(0, 0), (EMBEDDING,))], [(range(0, 4), (NORM, HEAD))]],
}


def round_trip(path: str, arrangement: str, layout: Layout) -> None:
    groups = groups_of(layout)
    architecture = architecture_of(read_config(path))
    parts = ARRANGEMENTS[arrangement][groups.pp.rank]
    chunks = [Chunk(architecture, layers, outer, layout.tp) for layers, outer in parts]
    load_hf(path, chunks, groups, architecture)
    source = load_file(f"{path}/model.safetensors")
    whole = {name: tensor.clone() for name, tensor in gathered(chunks, groups, architecture)}
    assert whole.keys() == source.keys()
    assert all(torch.equal(whole[name], source[name]) for name in source)
    for chunk in chunks:
        for number, layer in enumerate(chunk.decoder.layers):
            norm = chunk.get_parameter(f"decoder.layers.{number}.self_attention.linear_qkv.layer_norm_weight")
            assert torch.equal(norm, source[f"model.layers.{layer.layer_number - 1}.input_layernorm.weight"])


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_chunks_hold_the_layers_that_they_number(tmp_path: Path, arrangement: str, layout: Layout) -> None:
    path = save_tiny_model("llama", tmp_path / "model")
    run_ranks(layout.world, round_trip, path, arrangement, layout)
