"""Reading and writing Hugging Face directories; a damaged one is a UserError that names the damage."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.trainer_utils import align_special_tokens as transformers_align

from megalign import durable
from megalign.conversion.families import architecture_of, rules_of
from megalign.conversion.hf_config import align_special_tokens
from megalign.conversion.hf_files import HfReader, read_config
from megalign.conversion.hf_writer import HfWriter, parse_size
from megalign.conversion.rules import hf_shapes
from megalign.errors import UserError
from tests.tiny import save_tiny_model


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return Path(save_tiny_model("llama", tmp_path / "source"))


def check(path: Path) -> None:
    """What loading checks before it reads."""
    architecture = architecture_of(read_config(path))
    HfReader(path).check(hf_shapes(rules_of(architecture), architecture), ignored={"lm_head.weight"})


def rewrite(path: Path, change: object) -> None:
    """Changes the tensors of a single-file directory."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def write(target: Path, source: Path, **options: object) -> Path:
    """Writes the source's tensors as a new directory."""
    writer = HfWriter(target, source, **options)
    for name, tensor in load_file(source / "model.safetensors").items():
        writer.add(name, tensor)
    writer.close()
    return target


def test_read_gives_the_slice(model_dir: Path) -> None:
    reader = HfReader(model_dir)
    name = "model.layers.1.mlp.up_proj.weight"
    whole = load_file(model_dir / "model.safetensors")[name]
    assert reader.shape(name) == (48, 32)
    assert torch.equal(reader.read(name, (slice(5, 9), slice(0, 32))), whole[5:9])
    assert torch.equal(reader.read(name, (slice(0, 48), slice(16, 32))), whole[:, 16:])
    assert torch.equal(reader.read(name, (slice(5, 12, 3), slice(0, 32))), whole[5:12:3])
    assert torch.equal(reader.read(name, (7, slice(1, 32, 2))), whole[7, 1::2])
    assert torch.equal(reader.read(name, (slice(0, 48), 3)), whole[:, 3])


def test_sound_directories_pass_with_or_without_the_tied_head(model_dir: Path) -> None:
    check(model_dir)
    rewrite(model_dir, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(model_dir, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    check(model_dir)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensors: model.norm.weight"),
        (
            lambda t: t.update({"model.layers.0.extra": torch.ones(1)}),
            "unexpected tensors: model.layers.0.extra",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model.norm.weight \[31\] instead of \[32\]",
        ),
        (lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.ones(32)}), r"layers\.4\.input"),
    ],
)
def test_wrong_tensors_are_named(model_dir: Path, change: object, told: str) -> None:
    rewrite(model_dir, change)
    with pytest.raises(UserError, match=told):
        check(model_dir)


def test_missing_directory_and_files_are_named(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.*does not exist"):
        HfReader(tmp_path / "nowhere")
    (model_dir / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        HfReader(model_dir)
    (model_dir / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        HfReader(model_dir)
    (model_dir / "config.json").unlink()
    with pytest.raises(UserError, match="config.json does not exist"):
        HfReader(model_dir)


def test_truncated_and_missing_shards_are_named(model_dir: Path, tmp_path: Path) -> None:
    sharded = write(tmp_path / "sharded", model_dir, max_shard_size="20KB")
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"{shard.name} cannot be read"):
        HfReader(sharded)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} does not exist, though .*index.json names it"):
        HfReader(sharded)


def test_an_index_that_promises_too_much_is_named(model_dir: Path, tmp_path: Path) -> None:
    sharded = write(tmp_path / "sharded", model_dir, max_shard_size="20KB")
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.absent"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="lacks model.absent"):
        HfReader(sharded)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_what_is_written_loads_in_transformers_bitwise(model_dir: Path, tmp_path: Path, size: str) -> None:
    target = write(tmp_path / "written", model_dir, max_shard_size=size)
    names = {path.name for path in target.iterdir()}
    assert ("model.safetensors" in names) == (size == "5GB")
    shards = [path.stat().st_size for path in target.glob("*.safetensors")]
    assert size == "5GB" or (len(shards) > 3 and max(shards) < 25_000)
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model_dir, target))
    assert all(torch.equal(before[name], after[name]) for name in before)
    check(target)


def test_dtype_is_cast_and_written_into_the_config(model_dir: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "written", model_dir, dtype=torch.bfloat16)
    assert read_config(target)["dtype"] == "bfloat16"
    assert load_file(target / "model.safetensors")["model.norm.weight"].dtype is torch.bfloat16
    config = read_config(model_dir)
    config["torch_dtype"] = config.pop("dtype")
    (model_dir / "config.json").write_text(json.dumps(config))
    old = read_config(write(tmp_path / "old", model_dir, dtype=torch.bfloat16))
    assert old["torch_dtype"] == "bfloat16" and "dtype" not in old


def test_companion_files_travel(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "tokenizer.model").write_bytes(b"pieces")
    (model_dir / "chat_template.jinja").write_text("{{ messages }}")
    (model_dir / "README.md").write_text("not ours")
    target = write(tmp_path / "written", model_dir)
    assert (target / "tokenizer.model").read_bytes() == b"pieces"
    names = {path.name for path in target.iterdir()}
    assert {"chat_template.jinja", "generation_config.json"} <= names and "README.md" not in names


def test_what_the_source_lacks_does_not_stay_from_an_earlier_export(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("{{ messages }}")
    target = write(tmp_path / "written", model_dir)
    (target / "vocab.txt").write_text("not ours")
    (model_dir / "chat_template.jinja").unlink()
    write(target, model_dir)
    names = {path.name for path in target.iterdir()}
    assert "chat_template.jinja" not in names and {"vocab.txt", "generation_config.json"} <= names


@pytest.mark.parametrize("generation", [None, 2, [2], [7, 2], [3, 7]])
@pytest.mark.parametrize("config", [None, 2, 3, [3, 7], [7, 3]])
def test_special_tokens_are_aligned_as_transformers_does(config: object, generation: object) -> None:
    tokens = {"eos_token_id": 3, "pad_token_id": 0}
    ours = ({"eos_token_id": config, "pad_token_id": 5}, {"eos_token_id": generation, "pad_token_id": None})
    theirs = [SimpleNamespace(**values, bos_token_id=1) for values in ours]
    theirs[0].get_text_config = lambda: theirs[0]
    model = SimpleNamespace(config=theirs[0], generation_config=theirs[1])
    tokenizer = SimpleNamespace(**tokens, bos_token_id=None)
    assert align_special_tokens(*ours, tokens)
    transformers_align(model, tokenizer)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine == {name: getattr(wanted, name) for name in mine}
    assert not align_special_tokens(*ours, tokens)


def test_special_tokens_reach_both_config_files(model_dir: Path, tmp_path: Path) -> None:
    source = (model_dir / "generation_config.json").read_bytes()
    same = write(tmp_path / "same", model_dir, special_tokens={"eos_token_id": 2})
    assert (same / "generation_config.json").read_bytes() == source and read_config(same) == read_config(model_dir)
    changed = write(tmp_path / "changed", model_dir, special_tokens={"eos_token_id": 3})
    assert read_config(changed) == {**read_config(model_dir), "eos_token_id": 3}
    assert json.loads((changed / "generation_config.json").read_text())["eos_token_id"] == [3, 2]
    assert GenerationConfig.from_pretrained(changed).eos_token_id == [3, 2]
    (model_dir / "generation_config.json").unlink()
    alone = write(tmp_path / "alone", model_dir, special_tokens={"eos_token_id": 3})
    assert read_config(alone)["eos_token_id"] == 3 and not (alone / "generation_config.json").exists()


def test_writing_over_an_older_export_keeps_the_rest_and_drops_its_shards(model_dir: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "out", model_dir, max_shard_size="20KB")
    (target / "metrics.jsonl").write_text("kept")
    write(target, model_dir)
    assert [path.name for path in target.glob("*.safetensors*")] == ["model.safetensors"]
    assert (target / "metrics.jsonl").read_text() == "kept"
    assert not [path for path in (*target.iterdir(), *tmp_path.iterdir()) if "partial" in path.name]
    check(target)


def test_no_config_stands_at_the_target_until_all_else_does(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, sync = write(tmp_path / "out", model_dir, max_shard_size="20KB"), durable.sync

    def fail_in_the_target(path: Path) -> None:
        if path == target:
            raise OSError("Input/output error")
        sync(path)

    monkeypatch.setattr(durable, "sync", fail_in_the_target)
    with pytest.raises(UserError, match="Input/output error"):
        write(target, model_dir)
    assert (target / "model.safetensors").exists() and not (target / "config.json").exists()


def test_a_second_writer_is_refused_and_the_first_goes_on(model_dir: Path, tmp_path: Path) -> None:
    first = HfWriter(tmp_path / "out", model_dir, max_shard_size="20KB")
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        first.add(name, tensor)
    with pytest.raises(UserError, match="out is being written by another process"):
        HfWriter(tmp_path / "out", model_dir)
    first.close()
    check(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    write(tmp_path / "out", model_dir)


def test_nothing_stands_at_the_target_before_the_end(model_dir: Path, tmp_path: Path) -> None:
    writer = HfWriter(tmp_path / "out", model_dir, max_shard_size="1KB")
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        writer.add(name, tensor)
    assert not (tmp_path / "out").exists()
    writer.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_place_that_cannot_be_written_is_a_user_error(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the model to .*file/out"):
        HfWriter(tmp_path / "file" / "out", model_dir)


def test_weight_files_are_as_readable_as_the_config(model_dir: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "out", model_dir)
    modes = {stat.S_IMODE(os.stat(target / name).st_mode) for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_sizes_are_parsed_as_transformers_does() -> None:
    assert [parse_size(size) for size in ("5GB", "1.5MB", "2KiB", 7)] == [5 * 10**9, 1_500_000, 2048, 7]
    with pytest.raises(UserError, match="'many'"):
        parse_size("many")
