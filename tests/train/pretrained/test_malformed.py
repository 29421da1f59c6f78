"""A malformed folder of Hugging Face's format gets one line, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.settings import ConfigError
from tests.train.pretrained.shapes import SHAPES, export, make
from train.pretrained import adopt

pytestmark = pytest.mark.usefixtures("torch_code")


JUNK: list[Any] = [
    *(None, True, -7, 1.5, 10**9, 10**400, float("nan"), "a\nb", "\ud800"),
    *(["x"], [[None]], {}, {"a": {"b": [1]}}),
]
# Keys that a config.json may leave to a rule.
KEYS = [
    *("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "rope_theta"),
    *("full_attention_interval", "decoder_sparse_step", "mlp_only_layers", "num_experts"),
    *("rope_scaling", "partial_rotary_factor", "head_dim", "max_position_embeddings"),
]


def outcome(folder: Path, read: Callable[[Path], Any] = adopt.read) -> str:
    """The line that refuses a folder; empty if it is taken."""
    try:
        read(folder)
    except ConfigError as error:
        said = str(error)
        assert said.isprintable(), said
        assert len(said) < 1000
        assert str(folder) in said
        return said
    return ""


@pytest.fixture
def copy(hf: Path, tmp_path: Path) -> Path:
    """One of `hf` to spoil."""
    return Path(shutil.copytree(hf, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["qwen3-windows", "qwen3_next", "olmo_hybrid", "own"])
def test_no_value_of_a_config_is_a_traceback(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    made = make(SHAPES["qwen3_next" if name == "own" else name])
    export(made, folder, "headrace" if name == "own" else "auto")
    held = json.loads((folder / "config.json").read_text())
    inside = held["model"] if name == "own" else held
    refused = 0
    for key in dict.fromkeys([*inside, *KEYS]):
        for value in JUNK:
            spoiled = held | ({"model": inside | {key: value}} if name == "own" else {key: value})
            text = json.dumps(spoiled).encode("utf-8", "surrogatepass")
            (folder / "config.json").write_bytes(text)
            refused += bool(outcome(folder, adopt.description))
    assert refused > 4 * len(inside)
    for text in (b"", b"[]", b"7", b"{", b'{"model_type": "llama"}', b"\xff\xfe", b"[" * 10**5):
        (folder / "config.json").write_bytes(text)
        assert outcome(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; it must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "it must be a whole number from 1 to 4096"),
        ({"hidden_size": "32"}, 'hidden_size is "32"; it must be a whole number'),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; it must be a number"),
        ({"rms_norm_eps": 10**400}, "it must be a number from 0 to 1e+30"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; it must be a mapping"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "kv_heads is 3; it must be a divisor of heads"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000"),
        ({"vocab_size": 621}, "embed_tokens.weight is [620, 32] there and [621, 32] by its config"),
        ({"model_type": ["llama"]}, 'model_type is ["llama"]; it must be text'),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings is "no"; it must be true or false'),
        (
            {"head_dim": 1 << 20, "hidden_size": 1 << 20, "num_attention_heads": 1 << 20},
            "heads is 1048576; it must be at least 1 and at most 16384",
        ),
    ],
)
def test_a_malformed_config_is_named_by_its_key(
    changes: dict[str, Any], said: str, copy: Path
) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert said in outcome(copy)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"a": "../model.safetensors"}, "is no name of a safetensors file in its folder"),
        ({"a": "/etc/x.safetensors"}, "is no name of a safetensors file in its folder"),
        ({"a": "..\\x.safetensors"}, "is no name of a safetensors file in its folder"),
        ({"a": "\ud800.safetensors"}, "is no name of a safetensors file in its folder"),
        ({"a": "config.json"}, "is no name of a safetensors file in its folder"),
        ({"a": ["model.safetensors"]}, "is no name of a safetensors file in its folder"),
        ({"a": None}, "is no name of a safetensors file in its folder"),
        ({"a": "model-2.safetensors"}, "model-2.safetensors: cannot be read (No such file"),
        ({"a": "model.safetensors"}, '"a" is not in "model.safetensors", as it says'),
        ({"model.norm.weight": "model.safetensors", "b": "other.safetensors"}, "in another file"),
        ({}, "weight_map must be a mapping"),
        ([], "weight_map must be a mapping"),
        (7, "weight_map must be a mapping"),
    ],
)
def test_an_index_that_lies_is_refused(index: Any, said: str, copy: Path) -> None:
    """Above all one that names a file elsewhere."""
    save_file({"model.norm.weight": torch.zeros(3)}, copy / "other.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": index})
    (copy / "model.safetensors.index.json").write_text(text)
    assert said in outcome(copy)


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry | {"shape": [1 << 40, 1 << 40]},
        lambda entry: entry | {"shape": [-1]},
        lambda entry: entry | {"dtype": "F4711"},
        lambda entry: entry | {"data_offsets": [0, 10**15]},
        lambda entry: entry | {"data_offsets": [8, 0]},
        lambda entry: [],
        lambda entry: None,
    ],
)
def test_a_header_that_lies_is_refused(change: Any, copy: Path) -> None:
    path = copy / "model.safetensors"
    held, data = header(path)
    held["model.norm.weight"] = change(held["model.norm.weight"])
    text = json.dumps(held).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert "model.safetensors: cannot be read" in outcome(copy)


def test_a_file_cut_anywhere_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    content = path.read_bytes()
    for end in (0, 7, 8, 9, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        assert "model.safetensors: cannot be read" in outcome(copy)
    for size in (0, 1 << 63, len(content)):
        path.write_bytes(size.to_bytes(8, "little") + content[8:])
        assert "model.safetensors: cannot be read" in outcome(copy)


NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (NORM, None, f"there is no tensor {NORM}"),
        (NORM, torch.zeros(32, dtype=torch.int64), f"{NORM} is of dtype I64; F64, F32"),
        (DOWN, torch.zeros(32, 44).to(torch.float8_e4m3fn), f"{DOWN} is of dtype F8_E4M3"),
        (NORM, torch.zeros(()), f"{NORM} is [] there and [32] by its config.json"),
        (NORM, torch.zeros(33), f"{NORM} is [33] there and [32] by its config.json"),
        (DOWN, torch.zeros(44, 32), f"{DOWN} is [44, 32] there and [32, 44] by its config.json"),
        (DOWN, torch.zeros(32, 44, 1), f"{DOWN} is [32, 44, 1] there and [32, 44]"),
        ("a\nb", torch.zeros(2), '"a\\nb" has no place in such a model here'),
    ],
)
def test_tensors_that_are_none_of_the_model_are_named(
    name: str, tensor: torch.Tensor | None, said: str, copy: Path
) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), copy / "model.safetensors")
    assert said in outcome(copy)


def test_links_are_followed_as_the_cache_of_the_hub_has_them(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(copy.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    assert outcome(copy) == ""
