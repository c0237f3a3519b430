"""Checkpoints that conversions write are Megatron's, and those that Megatron writes are read: any layout, any spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file

from megalign.checkpoints.convert import megatron_to_hf
from megalign.checkpoints.reader import TorchDistReader
from megalign.checkpoints.stored import extra_states
from megalign.conversion.families import architecture_of
from megalign.conversion.hf_files import read_config
from megalign.patches.megatron import megatron_calls
from tests.checkpoints.models import Converted, bits_of
from tests.layouts import ONE_RANK, Layout, groups_of, make_engine
from tests.ranks import run_ranks
from tests.test_train_engine import weights
from tests.tiny import CONFIGS

pytestmark = pytest.mark.megatron

EXPERTS_APART = Layout(tp=2, sp=True, ep=2, etp=1)


def saved_by_engines(models: dict[str, str], target: str, layout: Layout, trainable: bool) -> None:
    for family, path in models.items():
        make_engine(path, layout, trainable=trainable).save(f"{target}/{family}")


def test_an_engines_checkpoint_converts_bitwise_and_has_the_same_names(converted: Converted, tmp_path: Path) -> None:
    models = {family: converted[family][0] for family in CONFIGS}
    run_ranks(1, saved_by_engines, models, str(tmp_path), ONE_RANK, False)
    for family, model in models.items():
        megatron_to_hf(tmp_path / family, tmp_path / f"{family}-back")  # it knows its config itself
        assert bits_of(tmp_path / f"{family}-back") == bits_of(model), family
        theirs, ours = TorchDistReader(tmp_path / family), TorchDistReader(converted[family][1])
        assert {name: theirs.shape(name) for name in theirs.names()}.items() <= {
            name: ours.shape(name) for name in ours.names()
        }.items(), family
        objects = theirs._metadata.state_dict_metadata.keys() - set(theirs.names()) - {"common_state/shard_0_1"}
        assert objects <= set(extra_states(architecture_of(read_config(model)))), family


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2, vpp=2)], ids=str)
def test_training_checkpoints_of_a_layout_convert_bitwise(layout: Layout, converted: Converted, tmp_path: Path) -> None:
    """The optimizer beside the weights is left out."""
    models = {family: converted[family][0] for family in ("llama", "qwen2", "gemma2")}
    run_ranks(2, saved_by_engines, models, str(tmp_path), layout, True)
    for family, model in models.items():
        megatron_to_hf(tmp_path / family, tmp_path / f"{family}-back")
        assert bits_of(tmp_path / f"{family}-back") == bits_of(model)


def test_training_checkpoints_with_experts_apart_convert_bitwise(converted: Converted, tmp_path: Path) -> None:
    models = {family: converted[family][0] for family in ("mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe")}
    run_ranks(2, saved_by_engines, models, str(tmp_path), EXPERTS_APART, False)
    for family, model in models.items():
        megatron_to_hf(tmp_path / family, tmp_path / f"{family}-back")
        assert bits_of(tmp_path / f"{family}-back") == bits_of(model)


def loaded_by_engines(checkpoints: dict[str, str], layout: Layout) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for family, checkpoint in checkpoints.items():
        engine = make_engine(f"{checkpoint}-zero", layout, trainable=False)
        engine.load(checkpoint)
        found[family] = weights(engine)
    return found


@pytest.mark.parametrize(
    ("layout", "families"),
    [
        (Layout(tp=2), ("llama", "glm4")),
        (Layout(pp=2), ("qwen3", "deepseek_v2")),
        (EXPERTS_APART, ("gpt_oss", "mixtral")),
    ],
    ids=str,
)
def test_an_engine_loads_a_converted_checkpoint(
    layout: Layout, families: tuple[str, ...], converted: Converted
) -> None:
    from safetensors.torch import save_file

    checkpoints = {}
    for family in families:
        model, checkpoint = converted[family]
        zero = Path(f"{checkpoint}-zero")  # a model of the same shapes, so that nothing is there before
        zero.mkdir(exist_ok=True)
        (zero / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
        tensors = load_file(f"{model}/model.safetensors")
        save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, zero / "model.safetensors")
        checkpoints[family] = str(checkpoint)
    for found in run_ranks(2, loaded_by_engines, checkpoints, layout):
        for family, tensors in found.items():
            source = load_file(f"{converted[family][0]}/model.safetensors")
            assert tensors.keys() == source.keys()
            for name, tensor in source.items():
                assert torch.equal(tensors[name].contiguous().view(torch.uint8), tensor.view(torch.uint8)), name


def plain_model(path: str, layout: Layout) -> GPTModel:
    """Megatron-Core's own model with its own local layers, every number of it 7."""
    config, groups = read_config(path), groups_of(layout)
    experts = config.get("num_local_experts")
    with megatron_calls():
        megatron = TransformerConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            kv_channels=config.get("head_dim"),
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=config["model_type"] == "qwen2",
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            pipeline_dtype=torch.float32,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp or layout.tp,
            sequence_parallel=layout.sp,
            num_moe_experts=experts,
            moe_token_dispatcher_type="alltoall",
            use_cpu_initialization=True,
        )
        model = GPTModel(
            megatron,
            get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm"),
            vocab_size=-(-config["vocab_size"] // layout.tp) * layout.tp,
            max_sequence_length=128,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            share_embeddings_and_output_weights=config.get("tie_word_embeddings", False),
            position_embedding_type="rope",
        )
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    return model


def load_and_save_plain(path: str, checkpoint: str, target: str, layout: Layout) -> None:
    model = plain_model(path, layout)
    Path(target).mkdir(exist_ok=True)
    with megatron_calls():
        state: dict[str, Any] = dist_checkpointing.load(model.sharded_state_dict(), checkpoint)
        model.load_state_dict(state, strict=False)
        dist_checkpointing.save(model.sharded_state_dict(), target)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", Layout(tp=2)),
        ("llama", Layout(pp=2)),
        ("qwen2", Layout(tp=2)),
        ("mixtral", Layout(dp=2, ep=2)),
        ("mixtral", Layout(pp=2)),
    ],
    ids=str,
)
def test_plain_megatron_loads_what_is_converted_and_its_own_converts_back(
    family: str, layout: Layout, converted: Converted, tmp_path: Path
) -> None:
    """Its names are the local layers', its vocabulary is padded."""
    model, checkpoint = converted[family]
    run_ranks(2, load_and_save_plain, model, str(checkpoint), str(tmp_path / "plain"), layout)
    left_out = megatron_to_hf(tmp_path / "plain", tmp_path / "back", Path(model))
    assert bits_of(tmp_path / "back") == bits_of(model)
    padded = {"embedding.word_embeddings.weight": 1, "output_layer.weight": 1}
    wanted = {} if layout.tp == 1 else padded if family != "llama" else {"embedding.word_embeddings.weight": 1}
    assert left_out == wanted
