"""Hugging Face -> Megatron -> Hugging Face on real ranks and real models, bitwise at every layout."""

from __future__ import annotations

import resource
import time
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import architecture_of
from megalign.conversion.hf_files import read_config
from megalign.errors import UserError
from megalign.model.build import HiddenStatesModel, build_model
from megalign.resharding.export import gathered, named_slices, save_hf, split_into_buckets
from megalign.resharding.layout import plan_of
from megalign.resharding.load import load_hf
from megalign.resharding.sync import sync_weights
from tests.layouts import EIGHT_RANKS, ONE_RANK, Layout, arguments, groups_of
from tests.ranks import run_ranks
from tests.tiny import DENSE_FAMILIES, save_tiny_model

pytestmark = pytest.mark.megatron

LAYOUTS = [
    ONE_RANK,
    Layout(tp=2),
    Layout(pp=2),
    Layout(cp=2),
    Layout(pp=2, vpp=2),
    Layout(pp=2, first=1),
    Layout(tp=2, pp=2),
    Layout(tp=2, cp=2),
    Layout(tp=4),
    Layout(pp=2, dp=2),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return marked_models(DENSE_FAMILIES, tmp_path_factory.mktemp("models"))


def marked_models(families: list[str], root: Path) -> dict[str, str]:
    """A model of each family, with what copying must not touch."""
    return {family: save_marked_model(family, root / family) for family in families}


def save_marked_model(family: str, path: Path, **changes: object) -> str:
    """A model with a negative zero, a denormal and a NaN that copying must not touch."""
    file = Path(save_tiny_model(family, path, **changes)) / "model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.view(-1)[:3] = torch.tensor([-0.0, 1e-42, float("nan")])[: tensor.numel()]
    save_file(tensors, file, metadata={"format": "pt"})
    return str(path)


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """What bitwise means."""
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def build(path: str, layout: Layout, **fields: object) -> tuple[list[HiddenStatesModel], Architecture]:
    """A model of the layout, every parameter NaN before it is loaded."""
    architecture = architecture_of(read_config(path))
    chunks = build_model(architecture, arguments(layout, **fields), groups_of(layout))
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
    load_hf(path, chunks, groups_of(layout), architecture)
    return chunks, architecture


def round_trip(models: dict[str, str], target: str, layout: Layout) -> None:
    groups = groups_of(layout)
    for family, path in models.items():
        source = load_file(f"{path}/model.safetensors")
        chunks, architecture = build(path, layout)
        for bucket_bytes in (256 << 20, 3000):
            stream = gathered(chunks, groups, architecture, bucket_bytes)
            whole = {name: tensor.clone() for name, tensor in stream}
            assert bits(whole) == bits(source), family
        assert [name for name in whole if ".layers." not in name][0] == "model.embed_tokens.weight"
        count = {name: torch.zeros(tensor.shape) for name, tensor in source.items()}
        for part in named_slices(chunks, groups, architecture):
            assert part.full_shape == count[part.hf_name].shape
            assert bits({"": part.tensor}) == bits({"": source[part.hf_name][part.index]}), part.hf_name
            count[part.hf_name][part.index] += 1
        for name in count:  # over the ranks of a model copy, each element once
            dist.all_reduce(count[name], group=groups.copy.group)
            assert (count[name] == 1).all(), name
        save_hf(f"{target}/{family}", path, chunks, groups, architecture, max_shard_size="30KB")


def check_round_trip(models: dict[str, str], target: Path, layout: Layout) -> None:
    run_ranks(layout.world, round_trip, models, str(target), layout)
    for family, path in models.items():
        written: dict[str, Tensor] = {}
        for file in (target / family).glob("*.safetensors"):
            written.update(load_file(file))
        assert bits(written) == bits(load_file(f"{path}/model.safetensors"))
        AutoModelForCausalLM.from_pretrained(target / family)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_hf_to_megatron_to_hf_is_bitwise(models: dict[str, str], tmp_path: Path, layout: Layout) -> None:
    check_round_trip(models, tmp_path, layout)


@pytest.mark.ranks8
def test_hf_to_megatron_to_hf_is_bitwise_on_eight_ranks(models: dict[str, str], tmp_path: Path) -> None:
    check_round_trip(models, tmp_path, EIGHT_RANKS)


def pad_rows(path: str, layout: Layout) -> list[float]:
    (chunk,), _ = build(path, layout)
    return [
        chunk.embedding.word_embeddings.weight[51 - 1].abs().sum().item(),
        chunk.output_layer.weight[-1].sum().item(),
    ]


def test_pad_rows_of_the_vocabulary_are_zero(models: dict[str, str]) -> None:
    # 101 rows over two ranks: the second rank's 51st row is no token.
    first, second = run_ranks(2, pad_rows, {**models}["qwen2"], Layout(tp=2))
    assert second == [0.0, 0.0] and first != second


def tied_copies(path: str, layout: Layout) -> bytes:
    (chunk,), _ = build(path, layout)
    weight = chunk.output_layer.weight if groups_of(layout).is_last_stage else chunk.embedding.word_embeddings.weight
    return bits({"": weight.detach()})[""]


def test_both_stages_of_a_tied_model_start_from_one_embedding(models: dict[str, str]) -> None:
    first, last = run_ranks(2, tied_copies, models["llama"], Layout(pp=2))
    assert first == last


def cast_while_loading(path: str, layout: Layout) -> None:
    source = load_file(f"{path}/model.safetensors")
    chunks, architecture = build(path, layout, bf16=True)
    for name, tensor in gathered(chunks, groups_of(layout), architecture):
        assert tensor.dtype is torch.bfloat16
        assert bits({"": tensor}) == bits({"": source[name].bfloat16()}), name


def test_loading_casts_to_the_parameters_dtype(models: dict[str, str]) -> None:
    run_ranks(2, cast_while_loading, models["qwen3"], Layout(tp=2))


class Broadcasts:
    """In place of torch's broadcast: how many were begun and waited for, and which of their buffers are still held."""

    def __init__(self) -> None:
        self.buffers: list[StorageWeakRef] = []
        self.num_waited = 0
        self.before_one: Callable[[], None] = lambda: None  # is called before its buffer is one of them
        self._broadcast = dist.broadcast

    def __call__(self, tensor: Tensor, **given: object) -> SimpleNamespace:
        self.before_one()
        self.buffers.append(StorageWeakRef(tensor.untyped_storage()))
        work = self._broadcast(tensor, **given)

        def wait() -> None:
            work.wait()
            self.num_waited += 1

        return SimpleNamespace(wait=wait)

    def are_let_go(self, count: int) -> bool:
        """Whether the first `count` buffers are; gloo's own thread holds one a little longer than who waits for it."""
        end = time.monotonic() + 5
        while not all(buffer.expired() for buffer in self.buffers[:count]) and time.monotonic() < end:
            time.sleep(0.001)
        return all(buffer.expired() for buffer in self.buffers[:count])


@contextmanager
def watched_broadcasts() -> Iterator[Broadcasts]:
    with mock.patch.object(dist, "broadcast", Broadcasts()) as broadcasts:
        yield broadcasts


def next_bucket_is_under_way(path: str, layout: Layout) -> None:
    chunks, architecture = build(path, layout)
    groups, limit = groups_of(layout), 5000
    plan = plan_of(chunks, groups, architecture)
    buckets = split_into_buckets(plan, limit)
    owners = [len({item.owner for name in names for item in plan.tensors[name]}) for names in buckets]
    up_to = [0, 0, *accumulate(owners), sum(owners)]  # broadcasts of the buckets before the one before, and so on
    place = {name: number for number, names in enumerate(buckets) for name in names}
    assert len(buckets) > 5

    with watched_broadcasts() as broadcasts:

        def two_at_most() -> None:
            bucket = bisect(up_to, len(broadcasts.buffers)) - 2
            assert broadcasts.are_let_go(up_to[bucket]), f"bucket {bucket} is the third"

        broadcasts.before_one = two_at_most
        for name, tensor in gathered(chunks, groups, architecture, limit):
            del tensor  # what whoever reads the stream keeps is not the stream's
            assert broadcasts.num_waited == up_to[place[name] + 2], name
            assert len(broadcasts.buffers) == up_to[place[name] + 3], name
        assert broadcasts.are_let_go(sum(owners))


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=str)
def test_the_next_bucket_travels_while_one_is_handed_out(models: dict[str, str], layout: Layout) -> None:
    run_ranks(2, next_bucket_is_under_way, models["llama"], layout)


class Raises:
    """A rollout engine that takes one tensor."""

    def update_weights(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        next(tensors)
        raise ZeroDivisionError


def leave_early(path: str, layout: Layout) -> None:
    chunks, architecture = build(path, layout)
    groups = groups_of(layout)
    engine = SimpleNamespace(gathered=lambda: gathered(chunks, groups, architecture, 5000))
    with watched_broadcasts() as broadcasts:
        stream = engine.gathered()
        next(stream)
        stream.close()
        with pytest.raises(ZeroDivisionError) as told:
            sync_weights(engine, Raises())
        assert broadcasts.num_waited == len(broadcasts.buffers) > 2 and told.traceback
    ones = torch.ones(1)
    dist.all_reduce(ones, group=groups.copy.group)
    assert ones.item() == groups.copy.size
    assert bits(dict(engine.gathered())) == bits(load_file(f"{path}/model.safetensors"))


def test_whoever_leaves_a_stream_early_leaves_nothing_under_way(models: dict[str, str]) -> None:
    run_ranks(2, leave_early, models["llama"], Layout(pp=2))


def load_error(path: str, broken: str, layout: Layout) -> str:
    chunks, architecture = build(path, layout)
    with pytest.raises(UserError) as told:
        load_hf(broken, chunks, groups_of(layout), architecture)
    dist.barrier()  # nobody was left waiting elsewhere
    return str(told.value)


def test_every_rank_names_the_tensor_that_is_missing(models: dict[str, str], tmp_path: Path) -> None:
    broken = Path(save_tiny_model("llama", tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]  # the first stage has no use for it
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    first, second = run_ranks(2, load_error, models["llama"], str(broken), Layout(pp=2))
    assert first == second and "missing tensors: model.layers.3.mlp.up_proj.weight" in first


def model_errors(path: str) -> list[str]:
    chunks, architecture = build(path, ONE_RANK)
    errors = []
    for change in ("unknown", "mis-shaped"):
        if change == "unknown":
            chunks[0].decoder.layers[2].gate = torch.nn.Linear(2, 2, bias=False)
        else:
            del chunks[0].decoder.layers[2].gate
            chunks[0].decoder.final_layernorm.weight = torch.nn.Parameter(torch.ones(33))
        with pytest.raises(UserError) as told:
            load_hf(path, chunks, groups_of(ONE_RANK), architecture)
        errors.append(str(told.value))
    return errors


def test_a_parameter_without_a_rule_or_of_another_shape_is_named(models: dict[str, str]) -> None:
    [(unknown, mis_shaped)] = run_ranks(1, model_errors, models["llama"])
    assert "llama has no rule for Megatron's decoder.layers.2.gate.weight" in unknown
    assert "decoder.final_layernorm.weight is [33], its rule wants [32]" in mis_shaped


def save_where_it_fails(path: str, target: str, layout: Layout, file_limit: int | None) -> str:
    chunks, architecture = build(path, layout)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if file_limit is not None and dist.get_rank() == 0:  # a write beyond it fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, before[1]))
    try:
        with pytest.raises(UserError) as told:
            save_hf(target, path, chunks, groups_of(layout), architecture, max_shard_size="20KB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    return str(told.value)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(dp=2)], ids=str)
def test_a_save_that_fails_is_a_user_error_on_every_rank(
    models: dict[str, str], tmp_path: Path, layout: Layout
) -> None:
    (tmp_path / "file").write_text("")
    for target, limit in ((tmp_path / "file" / "out", None), (tmp_path / "out", 15_000)):
        errors = run_ranks(2, save_where_it_fails, models["llama"], str(target), layout, limit)
        assert errors[0] == errors[1] and errors[0].startswith(f"cannot write the model to {target}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def refusal(path: str) -> str | None:
    try:
        build(path, ONE_RANK)
    except UserError as error:
        return str(error)
    return None


def test_a_tied_model_takes_no_head_of_its_own(tmp_path: Path) -> None:
    """A second copy of the embedding passes; another tensor would be lost silently."""
    path = save_tiny_model("llama", tmp_path)
    tensors = load_file(f"{path}/model.safetensors")
    found = []
    for head in (tensors["model.embed_tokens.weight"].clone(), tensors["model.embed_tokens.weight"] * 2):
        save_file({**tensors, "lm_head.weight": head}, f"{path}/model.safetensors", metadata={"format": "pt"})
        found += run_ranks(1, refusal, path)
    assert found[0] is None and "tie_word_embeddings" in found[1]
