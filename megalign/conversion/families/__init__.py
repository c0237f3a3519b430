"""The family table. A family is a module with HF_ARCHITECTURE, read_config and rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.config_values import check_layer_types, check_values
from megalign.conversion.families import (
    deepseek_v2,
    deepseek_v3,
    gemma2,
    gemma3_text,
    glm4,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from megalign.conversion.rules import Copy, Rule
from megalign.errors import UserError

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3": phi3,
    "glm4": glm4,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}
"""By model_type, which is also Architecture.family."""
HEAD = "output_layer.weight"
SCORE_HEAD = "score.weight"
_LANGUAGE_MODEL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
_ODD_CLASSIFIERS = {"Gemma3ForCausalLM": "Gemma3TextForSequenceClassification"}  # the plain name is multimodal


def family_of(config: Mapping[str, Any]) -> ModuleType:
    """The family of a config.json's content, whichever head it has."""
    by_architecture = {family.HF_ARCHITECTURE: kind for kind, family in FAMILIES.items()}
    by_classifier = {_classifier_of(family): kind for kind, family in FAMILIES.items()}
    name, told = _class_name(config), config.get("model_type")
    # A config that was never saved with a model has no architecture; its type then says what it is.
    kind = told if name is None else (by_architecture | by_classifier).get(name)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"architecture {name or told!r} is not supported; megalign has {', '.join(by_architecture)} and their "
            f"{_CLASSIFIER} (see config.json's 'architectures')"
        )
    if told not in (None, kind):  # transformers goes by the type alone
        raise UserError(
            f"config.json's model_type={told!r} contradicts its architectures, {name}, whose type is {kind!r}; copy "
            "both from the model's original"
        )
    return FAMILIES[kind]


def _class_name(config: Mapping[str, Any]) -> str | None:
    """transformers' class, if the config says it."""
    names = config.get("architectures")
    if not names:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise UserError(
            f"config.json's architectures={names!r} must be a list of names; copy it from the model's original"
        )
    return names[0]


def _classifier_of(family: ModuleType) -> str:
    name = family.HF_ARCHITECTURE
    return _ODD_CLASSIFIERS.get(name, name.replace(_LANGUAGE_MODEL, _CLASSIFIER))


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether the config.json is of a sequence classifier: a reward model."""
    return (_class_name(config) or "").endswith(_CLASSIFIER)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Reads the content of a config.json; what megalign does not compute is refused by name."""
    check_values(config)
    architecture = family_of(config).read_config(config)
    check_layer_types(config, architecture)
    if "pad_token_id" in config:  # else the family's
        pad = config["pad_token_id"]
        # As torch counts: -1 is the last row.
        architecture = replace(architecture, pad_token_id=None if pad is None else pad % architecture.vocab_size)
    if not is_classifier(config):
        return architecture
    # transformers' own default is 2; it writes the names of the labels and not their number.
    num_labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if num_labels != 1:
        raise UserError(
            f"a sequence classifier with {num_labels} labels is no reward model: it must have 1; "
            "train or save it with num_labels=1"
        )
    return architecture.with_score_head()


def rules_of(architecture: Architecture) -> list[Rule]:
    """The weight rules of an architecture."""
    rules = FAMILIES[architecture.family].rules(replace(architecture, num_labels=None))
    if architecture.num_labels is None:
        return rules
    score = Copy.of(HEAD, SCORE_HEAD, ("num_labels", "hidden_size"))
    return [score if rule.megatron == HEAD else rule for rule in rules]


def exported_config(config: Mapping[str, Any], architecture: Architecture, pad_token_id: int | None) -> dict[str, Any]:
    """What the config.json of an exported model says otherwise than the one it came from."""
    # Layers behind the last, which are not loaded: the files lack them.
    changes = {name: 0 for name in ("num_nextn_predict_layers", "num_mtp_layers") if config.get(name)}
    if architecture.num_labels is not None:
        changes |= classifier_config(config, pad_token_id)
    return changes


def classifier_config(config: Mapping[str, Any], pad_token_id: int | None) -> dict[str, Any]:
    """What a config.json says otherwise once the model has a score head of one output."""
    changes: dict[str, Any] = {
        "architectures": [_classifier_of(family_of(config))],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    # transformers finds the last token of a padded row by it, and refuses a batch without.
    pad = config.get("pad_token_id") if pad_token_id is None else pad_token_id
    return changes if pad is None else {**changes, "pad_token_id": pad}
