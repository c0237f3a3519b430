"""What does not fit is named and fails; what was pickled to run is refused, and does not run."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalign.checkpoints import convert
from megalign.checkpoints.check import differences
from megalign.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megalign.checkpoints.inspect import summary_of
from megalign.checkpoints.writer import Chunk, write_checkpoint
from megalign.conversion.hf_config import write_json
from megalign.conversion.hf_files import read_config
from megalign.errors import UserError
from megalign.trainers.manifest import write_manifest
from tests.checkpoints.models import Converted, bits_of
from tests.layouts import ONE_RANK, make_engine
from tests.ranks import run_ranks


def rewritten(checkpoint: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The checkpoint with other tensors, whole ones, as another program might have written it."""
    from megalign.checkpoints.reader import TorchDistReader

    reader = TorchDistReader(checkpoint)
    tensors = {}
    for name in reader.names():
        region = tuple(slice(0, size) for size in reader.shape(name))
        tensors[name] = torch.empty(reader.shape(name), dtype=reader.dtype(name))
        for part in reader.parts(name, (), region):
            tensors[name][part.index] = part.view
    change(tensors)
    target.mkdir()
    chunks = [
        Chunk(name, tuple(t.shape), t.dtype, (0,) * t.dim(), tuple(t.shape), lambda t=t: t)
        for name, t in tensors.items()
    ]
    write_checkpoint(target, chunks, [], {}, lambda _: None)
    return target


def error_of(checkpoint: Path, output: Path, reference: str) -> str:
    with pytest.raises(UserError) as told:
        megatron_to_hf(checkpoint, output, Path(reference))
    assert not output.exists()
    return str(told.value)


def test_every_wrong_tensor_of_a_checkpoint_is_named(converted: Converted, tmp_path: Path) -> None:
    model, checkpoint = converted["qwen2"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["decoder.final_layernorm.weight"]
        tensors["decoder.layers.mlp.gate.weight"] = torch.zeros(4, 3)
        tensors["decoder.layers.mlp.linear_fc2.weight"] = torch.zeros(4, 32, 47)
        tensors["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(2)  # no part of the model

    error = error_of(rewritten(checkpoint, tmp_path / "bad", change), tmp_path / "out", model)
    assert "missing tensors: decoder.final_layernorm.weight" in error
    assert "unexpected tensors: decoder.layers.mlp.gate.weight [4, 3]" in error
    assert "mis-shaped tensors: decoder.layers.mlp.linear_fc2.weight [4, 32, 47] instead of [4, 32, 48]" in error
    assert "optimizer" not in error


def test_every_wrong_tensor_of_a_directory_is_named(converted: Converted, tmp_path: Path) -> None:
    bad = shutil.copytree(converted["qwen2"][0], tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors |= {"model.extra": torch.zeros(1), "lm_head.weight": torch.zeros(101, 31)}
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(UserError) as told:
        hf_to_megatron(bad, tmp_path / "out")
    for text in ("missing tensors: model.norm.weight", "unexpected tensors: model.extra", "lm_head.weight [101, 31]"):
        assert text in str(told.value)
    assert list(tmp_path.iterdir()) == [bad]


def test_a_config_of_far_more_layers_is_refused_before_they_are_counted(converted: Converted, tmp_path: Path) -> None:
    bad = shutil.copytree(converted["llama"][0], tmp_path / "bad")
    write_json(bad / "config.json", read_config(bad) | {"num_hidden_layers": 10**7, "layer_types": None})
    # All names would take minutes and more memory than the test may have.
    with pytest.raises(UserError, match="num_hidden_layers=10000000") as told:
        hf_to_megatron(bad, tmp_path / "out")
    assert "missing tensors: model.layers.4.self_attn.q_proj.weight" in str(told.value) and len(str(told.value)) < 1500
    error = error_of(converted["llama"][1], tmp_path / "out", str(bad))
    assert "linear_qkv.weight [4, 96, 32] instead of [10000000, 96, 32]" in error


@pytest.mark.parametrize("rows", [128, 100])
def test_rows_behind_the_vocabulary_are_left_out_and_said(rows: int, converted: Converted, tmp_path: Path) -> None:
    """Megatron-LM pads to a multiple of 128 times the tensor ranks; fewer rows than tokens are another model's."""
    model, checkpoint = converted["qwen2"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            padded = torch.full((rows, 32), 7.0)
            padded[:101] = tensors[name][:rows]
            tensors[name] = padded

    padded = rewritten(checkpoint, tmp_path / "padded", change)
    if rows < 101:
        assert "output_layer.weight [100, 32] instead of [101, 32]" in error_of(padded, tmp_path / "out", model)
        return
    left_out = megatron_to_hf(padded, tmp_path / "out", Path(model))
    assert left_out == {"embedding.word_embeddings.weight": 27, "output_layer.weight": 27}
    assert bits_of(tmp_path / "out") == bits_of(model)


def test_other_programs_names_and_prefixes_are_read(converted: Converted, tmp_path: Path) -> None:
    model, checkpoint = converted["mixtral"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["decoder.layers.pre_mlp_layernorm.weight"]  # the local layers' name of it stays
        fc2 = tensors.pop("decoder.layers.mlp.experts.experts.linear_fc2.weight")
        tensors |= {f"decoder.layers.mlp.experts.experts.{e}.linear_fc2.weight": fc2[:, e].clone() for e in range(4)}
        for name in list(tensors):
            tensors[f"module.{name}"] = tensors.pop(name)

    other = rewritten(checkpoint, tmp_path / "other", change)
    megatron_to_hf(other, tmp_path / "out", Path(model))
    assert bits_of(tmp_path / "out") == bits_of(model)


def test_two_copies_of_a_norm_must_agree(converted: Converted, tmp_path: Path) -> None:
    model, checkpoint = converted["mixtral"]
    change = lambda tensors: tensors["decoder.layers.pre_mlp_layernorm.weight"][2].fill_(3.0)  # noqa: E731
    error = error_of(rewritten(checkpoint, tmp_path / "bad", change), tmp_path / "out", model)
    assert "decoder.layers.2.pre_mlp_layernorm.weight twice" in error


def test_a_foreign_checkpoint_needs_a_reference_and_an_old_one_no_longer(converted: Converted, tmp_path: Path) -> None:
    model, checkpoint = converted["llama"]
    foreign = rewritten(checkpoint, tmp_path / "foreign", lambda tensors: None)
    with pytest.raises(UserError, match="give --hf-reference DIR"):
        megatron_to_hf(foreign, tmp_path / "out")
    shutil.copytree(foreign, tmp_path / "run/iter_0000012")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("12\n")
    megatron_to_hf(tmp_path / "run", tmp_path / "out", Path(model))
    assert bits_of(tmp_path / "out") == bits_of(model)
    for odd in ("\u00b2".encode(), b"\xff\xfe", "\u0663".encode(), b"9" * 5000):
        (tmp_path / "run/latest_checkpointed_iteration.txt").write_bytes(odd)
        with pytest.raises(UserError, match="run holds no torch_dist checkpoint"):
            megatron_to_hf(tmp_path / "run", tmp_path / "odd", Path(model))
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("12\n")
    (tmp_path / "run/iter_0000012/metadata.json").unlink()
    with pytest.raises(UserError, match="not written to its end"):
        megatron_to_hf(tmp_path / "run", tmp_path / "again", Path(model))
    with pytest.raises(UserError, match="out exists already"):
        megatron_to_hf(foreign, tmp_path / "out", Path(model))


@pytest.mark.parametrize("there", [True, False])
def test_a_second_conversion_meanwhile_is_refused_and_the_first_is_whole(
    there: bool, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, writing = (hf_to_megatron, "write_checkpoint") if there else (megatron_to_hf, "_write_share")
    mine, other = (Path(converted[family][not there]) for family in ("llama", "qwen2"))
    write = getattr(convert, writing)

    def write_slowly(*given: Any) -> None:
        write(*given)
        monkeypatch.setattr(convert, writing, write)
        with pytest.raises(UserError, match="out is being written by another process"):
            tool(other, tmp_path / "out")

    monkeypatch.setattr(convert, writing, write_slowly)
    tool(mine, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    if there:
        megatron_to_hf(tmp_path / "out", tmp_path / "back")
    assert bits_of(tmp_path / ("back" if there else "out")) == bits_of(converted["llama"][0])


@pytest.mark.parametrize("there", [True, False])
def test_an_empty_output_gives_way_and_a_link_does_not(there: bool, converted: Converted, tmp_path: Path) -> None:
    tool, source = (hf_to_megatron if there else megatron_to_hf), Path(converted["llama"][not there])
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with pytest.raises(UserError, match="link exists already as a link; choose another directory, or remove it"):
        tool(source, tmp_path / "link")
    tool(source, tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "link"} and any((tmp_path / "empty").iterdir())


def test_tensors_of_two_dtypes_in_one_of_megatrons_are_refused(converted: Converted, tmp_path: Path) -> None:
    mixed = shutil.copytree(converted["llama"][0], tmp_path / "mixed")
    tensors = load_file(mixed / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"].bfloat16()
    save_file(tensors, mixed / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.self_attn.k_proj.weight is torch.bfloat16.*--dtype"):
        hf_to_megatron(mixed, tmp_path / "out")


# ---- a trainer's checkpoint, whose manifest has checksums


@pytest.fixture
def saved(converted: Converted, tmp_path: Path) -> Path:
    """A checkpoint-N with its engine."""
    path = tmp_path / "checkpoint-3"
    shutil.copytree(converted["llama"][1], path / "engine")
    write_manifest(path, {"step": 3, "settings": {}, "layout": {"tp": 2}}, {})
    return path


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_trainers_checkpoint_whose_files_are_as_it_wrote_them_is_converted(
    converted: Converted, saved: Path, tmp_path: Path
) -> None:
    megatron_to_hf(saved, tmp_path / "out")
    assert bits_of(tmp_path / "out") == bits_of(converted["llama"][0])
    assert (summary_of(saved).step, summary_of(saved / "engine").layout) == (3, {"tp": 2})


@pytest.mark.parametrize("inner", ["", "engine"])
def test_a_flipped_bit_is_not_converted(inner: str, converted: Converted, saved: Path, tmp_path: Path) -> None:
    damaged = saved / "engine/__0_0.distcp"
    flip_a_bit(damaged)
    message = f"{damaged} is damaged: its checksum is not the one in its manifest; use another checkpoint"
    assert error_of(saved / inner, tmp_path / "out", converted["llama"][0]) == message
    with pytest.raises(UserError, match="its checksum is not the one"):
        next(differences(Path(converted["llama"][0]), saved))


@pytest.mark.parametrize("cut", [b"", b'{"step": 3', b"[1]", b"{}", b"\xff"])
@pytest.mark.parametrize("file", ["manifest.json", "engine/metadata.json"])
def test_a_cut_json_file_is_named(file: str, cut: bytes, converted: Converted, saved: Path, tmp_path: Path) -> None:
    (saved / file).write_bytes(cut)
    error = error_of(saved, tmp_path / "out", converted["llama"][0])
    named = saved / "engine" if (file, cut) == ("engine/metadata.json", b"{}") else saved / file
    assert str(named) in error and "\n" not in error, error
    with pytest.raises(UserError):
        summary_of(saved)


def test_a_manifest_of_something_else_is_told_apart(converted: Converted, tmp_path: Path) -> None:
    directory = shutil.copytree(converted["llama"][1], tmp_path / "site/model")
    (tmp_path / "site/manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(UserError, match=r"site/manifest.json is damaged, or no trainer's; .*move .*site/model elsewh"):
        megatron_to_hf(directory, tmp_path / "out")


# ---- what must not run


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self._mark)!r}, 'w')",))


def poison_metadata(directory: Path, evil: Evil) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(evil))


def poison_common(directory: Path, evil: Evil) -> None:
    torch.save({"args": evil}, directory / "common.pt")


def poison_item(directory: Path, evil: Evil, *, of: str) -> None:
    """Points an entry of .metadata to an evil one that is put behind the others."""
    with (directory / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    info = next(info for index, info in metadata.storage_data.items() if of in index.fqn)
    with (directory / info.relative_path).open("ab") as file:
        info.offset = file.tell()
        torch.save([evil], file)
        info.length = file.tell() - info.offset
    with (directory / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


POISONS: dict[str, Callable[[Path, Evil], None]] = {
    ".metadata": poison_metadata,
    "common.pt": poison_common,
    "final_layernorm": lambda directory, evil: poison_item(directory, evil, of="decoder.final_layernorm.weight"),
    "_extra_state": lambda directory, evil: poison_item(directory, evil, of="linear_proj._extra_state"),
}


def load_error(model: str, directory: str) -> str:
    engine = make_engine(model, ONE_RANK, trainable=False)
    with pytest.raises(UserError) as told:
        engine.load(directory)
    return str(told.value)


@pytest.mark.megatron
@pytest.mark.parametrize("place", POISONS)
def test_a_training_run_loads_no_class(place: str, converted: Converted, tmp_path: Path) -> None:
    model, checkpoint = converted["llama"]
    bad = shutil.copytree(checkpoint, tmp_path / "bad")
    POISONS[place](bad, Evil(tmp_path / "it ran"))
    (error,) = run_ranks(1, load_error, model, str(bad))
    assert place in error and "builtins.exec" in error and "it is not loaded" in error, error
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("place", [".metadata", "common.pt", "final_layernorm"])
def test_the_tools_load_no_class(place: str, converted: Converted, tmp_path: Path) -> None:
    model, checkpoint = converted["llama"]
    bad = shutil.copytree(checkpoint, tmp_path / "bad")
    POISONS[place](bad, Evil(tmp_path / "it ran"))
    tool = summary_of if place == "common.pt" else lambda path: megatron_to_hf(path, tmp_path / "out", Path(model))
    with pytest.raises(UserError, match=rf"{place}.*builtin(s|__)\.exec.*it is not loaded"):
        tool(bad)
    assert not (tmp_path / "it ran").exists() and not (tmp_path / "out").exists()


def test_a_name_inside_what_is_allowed_is_refused(converted: Converted, tmp_path: Path) -> None:
    bad = shutil.copytree(converted["llama"][1], tmp_path / "bad")
    # Protocol 4 resolves dots: Metadata.__init__.__globals__ would hold every module.
    module, name = b"torch.distributed.checkpoint.metadata", b"Metadata.__init__"
    text = b"".join(b"\x8c" + bytes([len(word)]) + word for word in (module, name))
    (bad / ".metadata").write_bytes(b"\x80\x04" + text + b"\x93.")
    with pytest.raises(UserError, match=r"metadata\.Metadata\.__init__"):
        summary_of(bad)


def test_no_file_outside_the_checkpoint_is_read(converted: Converted, tmp_path: Path) -> None:
    bad = shutil.copytree(converted["llama"][1], tmp_path / "bad")
    with (bad / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (bad / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="names the file '../elsewhere'"):
        summary_of(bad)


def test_a_pickle_in_the_place_of_safetensors_is_refused(converted: Converted, tmp_path: Path) -> None:
    bad = shutil.copytree(converted["llama"][0], tmp_path / "bad")
    (bad / "model.safetensors").write_bytes(pickle.dumps(Evil(tmp_path / "it ran")))
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        hf_to_megatron(bad, tmp_path / "out")
    (bad / "model.safetensors").unlink()
    write_json(bad / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": "../x.safetensors"}})
    with pytest.raises(UserError, match="names '../x.safetensors', which is not beside it"):
        hf_to_megatron(bad, tmp_path / "out")
    assert not (tmp_path / "it ran").exists() and read_config(bad)


def test_megatron_lms_options_are_read_without_their_classes(converted: Converted, tmp_path: Path) -> None:
    import sys
    from argparse import Namespace as Options
    from types import ModuleType

    module = ModuleType("megatron.training.only_there")
    module.Kind = type("Kind", (), {"__module__": module.__name__, "__qualname__": "Kind"})
    options = Options(tensor_model_parallel_size=4, kind=module.Kind(), params_dtype=torch.bfloat16)
    sys.modules[module.__name__] = module
    theirs = shutil.copytree(converted["llama"][1], tmp_path / "theirs")
    torch.save({"args": options, "iteration": 31, "rng": torch.zeros(3)}, theirs / "common.pt")
    del sys.modules[module.__name__]
    found = summary_of(theirs)
    assert (found.step, found.layout) == (31, {"tensor_model_parallel_size": 4})
    assert module.__name__ not in sys.modules
