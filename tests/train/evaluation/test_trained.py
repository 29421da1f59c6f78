"""`train.load`: folders of every kind give the same model, and its logits say all the rest."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from data.settings import ConfigError
from data.tokens import tokenizer as tokenizers
from tests.train.runs import ROOT
from tests.train.test_start import Real
from train import Trained, load
from train.__main__ import main
from train.config import read
from train.evaluation.generate import CHUNK, Decoder, sample
from train.evaluation.sampling import Sampling
from train.survival import manifest

TEXT = Path(__file__).read_text(encoding="utf-8")
SHORT = "def load(folder: str) -> int:\n    return 12  # é 漢\n"
KINDS = ("run", "checkpoint", "file", "export", "own", "import", "moved")

pytestmark = pytest.mark.usefixtures("torch_code")


def by_transformers(folder: Path, ids: list[int]) -> Tensor:
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return made(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_holds_the_same_model(
    kind: str, folders: dict[str, Path], model: Trained
) -> None:
    found = load(folders[kind])
    ids = found.encode(SHORT)
    assert ids == model.encode(SHORT)
    assert found.tokenizer.decode(ids) == SHORT
    logits = found.logits(ids)
    assert logits.shape == (len(ids), found.tokenizer.vocab_size)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model.logits(ids), rtol=0, atol=1e-5)
    assert found.nats(SHORT) == pytest.approx(model.nats(SHORT), rel=1e-5)
    assert found.config.model.blocks == ["gated_deltanet", "attention"]
    if kind not in {"moved", "import"}:
        assert found.config.train.seq_len == 192


@pytest.mark.parametrize("kind", ["run", "export", "import"])
def test_a_model_is_loaded_a_tensor_at_a_time(
    kind: str, folders: dict[str, Path], model: Trained
) -> None:
    """In bf16 half of what the folder holds, and one of its tensors; nothing is drawn."""
    generator = torch.get_rng_state()
    with Real() as ledger:
        found = load(folders[kind], ["train.dtype=bf16"])
    sizes = [parameter.numel() for parameter in found.model.parameters()]
    assert ledger.peak <= 1.02 * 2 * sum(sizes) + 4 * max(sizes)
    assert torch.equal(torch.get_rng_state(), generator)
    held, whole = found.model.state_dict(), model.model.state_dict()
    if kind == "run":
        assert all(torch.equal(held[name], whole[name].bfloat16()) for name in whole)


def test_logits_are_those_of_transformers(folders: dict[str, Path], llama: Path) -> None:
    for folder in (folders["export"], llama):
        found = load(folder)
        ids = found.encode(SHORT)
        wanted = by_transformers(folder, ids)
        assert wanted.shape == (len(ids), found.stored.vocab_size)
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found.logits(ids), wanted, rtol=0, atol=2e-5 * scale)


def test_a_conversion_is_a_model_too(llama: Path, tmp_path: Path) -> None:
    words = ["--to", str(tmp_path / "hybrid"), "--pattern", "[liger, attention]"]
    assert main(["convert", str(llama), *words]) == 0
    found = load(tmp_path / "hybrid")
    assert found.config.model.blocks == ["liger", "attention"]
    assert found.encode(SHORT) == load(llama).encode(SHORT)
    assert math.isfinite(found.bits_per_byte(SHORT))


def test_nats_are_those_of_the_logits(model: Trained) -> None:
    """Also past a chunk, and of ids in every form that they may have."""
    text = TEXT[:6000]
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    assert len(ids) > CHUNK + 10
    logits = model.logits(ids)
    chances = logits.double().log_softmax(-1)
    wanted = torch.tensor(
        [-float(row[after]) for row, after in zip(chances, ids[1:], strict=False)]
    )
    for form in (ids, torch.tensor(ids), torch.tensor(ids).numpy()):
        torch.testing.assert_close(model.losses(form), wanted, rtol=0, atol=2e-4)
    assert model.losses(ids).shape == (len(ids) - 1,)
    assert model.nats(text) == pytest.approx(float(wanted.double().sum()), rel=1e-5)
    wanted_bits = model.nats(text) / math.log(2) / len(text.encode("utf-8"))
    assert model.bits_per_byte(text) == pytest.approx(wanted_bits, rel=1e-9)
    assert model.nats("") == 0
    assert model.logits([]).shape == (0, logits.shape[1])
    assert model.losses([3]).shape == (0,)


def test_losses_make_no_logits_of_the_head(model: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those would be all rows at once; the loss makes them a chunk at a time."""
    from train.model.transformer import F

    made: list[int] = []
    linear = F.linear

    def counting(x, weight, bias=None):  # type: ignore[no-untyped-def]
        if weight.shape[0] == model.stored.vocab_size:
            made.append(x.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counting)
    model.nats(SHORT)
    assert made == []
    model.logits([1, 2, 3])
    assert made == [3]


def test_what_is_generated_is_drawn_from_the_logits(model: Trained) -> None:
    """Greedily: each piece's token is the likeliest after those before, by a forward of all."""
    pieces = list(model.generate("import ", tokens=12, temperature=0))
    text = "".join(pieces)
    ids = model.encode("import ")
    begun = len(ids)
    while len(ids) < begun + 12:
        ids.append(int(model.logits(ids)[-1].argmax()))
    assert text == model.tokenizer.decode(ids[1:]).removeprefix("import ")
    once, again, other = (
        "".join(model.generate("import ", 12, 1.0, seed)) for seed in (1, 1, 2**64 - 1)
    )
    assert once == again != other
    assert list(model.generate("x", tokens=0)) == []
    assert isinstance("".join(model.generate(tokens=3)), str)


def test_generation_ends_at_any_of_the_ids_that_end_a_text(
    model: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, sampling = model.encode("import "), Sampling(12, 1.0, seed=5)
    tokens = list(sample(Decoder(model.model), model.tokenizer, ids, sampling))
    place = next(i for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i])
    monkeypatch.setattr(model.tokenizer, "end_ids", frozenset({tokens[place], 1}))
    made = "".join(model.generate("import ", 12, 1.0, seed=5))
    assert made == model.tokenizer.decode([*ids, *tokens[:place]]).removeprefix("import ")


def test_rows_that_are_no_piece_are_never_drawn(llama: Path) -> None:
    found = load(llama)
    rows, pieces = found.stored.vocab_size, found.tokenizer.vocab_size
    assert rows == pieces + 7
    with torch.no_grad():
        # Some are by far the likeliest, whatever the hidden state is.
        found.model.head.weight[pieces:] = 1e3 * found.model.head.weight[pieces - 1]
        found.model.head.weight[-1] *= -1
    assert int(found.logits(found.encode("a"))[-1].argmax()) >= pieces
    drawn = sample(Decoder(found.model), found.tokenizer, found.encode("a"), Sampling(60, 5.0))
    assert max(drawn) < pieces


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e308])
def test_no_temperature_is_too_low_or_too_high(model: Trained, temperature: float) -> None:
    made = "".join(model.generate("def ", tokens=4, temperature=temperature))
    if temperature < 1:
        assert made == "".join(model.generate("def ", tokens=4, temperature=0))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"tokens": -1}, "tokens is -1; it must not be negative"),
        ({"temperature": -0.5}, "temperature is -0.5; it must be a number, 0 or more"),
        ({"temperature": math.nan}, "temperature is nan; it must be a number"),
        ({"temperature": math.inf}, "temperature is inf; it must be a number"),
        ({"seed": -1}, "seed is -1; it must be from 0 to 2^64"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be from 0"),
        ({"text": "a\udcff"}, "character 2 is '\\udcff'"),
    ],
)
def test_what_generate_cannot_do_is_said_at_once(
    model: Trained, words: dict, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        model.generate(**words)
    assert said in str(error.value)
    # And on the command line, in one line.
    prompt = words.get("text", "x")
    options = [f"--{key}={value}" for key, value in words.items() if key != "text"]
    assert main(["generate", str(model.stored.folder), *options, "--", prompt]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("PROMPT is 'a\\udcff'" if "text" in words else f"--{said}") in line


@pytest.mark.parametrize("method", ["nats", "bits_per_byte", "generate"])
def test_text_that_utf_8_cannot_hold_is_refused(model: Trained, method: str) -> None:
    with pytest.raises(ConfigError, match="UTF-8"):
        getattr(model, method)("ab\ud800c")


@pytest.mark.parametrize(
    "ids", [[[1, 2]], [0.5, 1.5], 3, [5, 10**6], [-1], torch.ones(2, 2, dtype=torch.int64)]
)
def test_ids_that_are_none_are_refused(model: Trained, ids: list) -> None:
    for method in (model.logits, model.losses):
        with pytest.raises(ValueError, match="ids must be"):
            method(ids)
    with pytest.raises(ValueError, match="text is empty"):
        model.bits_per_byte("")


def test_a_step_of_a_run_or_its_line(undisturbed: Path, folders: dict[str, Path]) -> None:
    second = manifest.published(undisturbed / manifest.CHECKPOINTS)[-1]
    assert load(undisturbed, step=2).stored.source == second
    assert str(second) in repr(load(second))
    assert load(second).stored.step == 2
    for folder, said in ((undisturbed, "has checkpoints of 8"), (folders["own"], "has no steps")):
        with pytest.raises(ConfigError, match=said):
            load(folder, step=3)


def test_a_folder_is_known_by_what_lies_in_it(
    folders: dict[str, Path], undisturbed: Path, config: Path, tmp_path: Path, model: Trained
) -> None:
    """Not by a file more: some models come with a config.yaml that is none of ours."""
    export = Path(shutil.copytree(folders["export"], tmp_path / "export"))
    (export / "config.yaml").write_text("something: else\n", encoding="utf-8")
    assert load(export).nats(SHORT) == pytest.approx(model.nats(SHORT), rel=1e-5)
    ours = Path(shutil.copytree(folders["import"], tmp_path / "import"))
    (ours / "config.json").write_text("{}", encoding="utf-8")
    assert load(ours).nats(SHORT) == pytest.approx(model.nats(SHORT), rel=1e-5)
    copied = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    named = copied / manifest.CHECKPOINTS / "best"
    manifest.published(copied / manifest.CHECKPOINTS)[0].rename(named)
    (corpus,) = Path(read(config).data.root).glob("*/manifest.json")
    for folder in (named, corpus.parent):
        with pytest.raises(ConfigError, match="lies in no run's folder"):
            load(folder)


def test_a_run_whose_text_has_changed_wants_its_tokenizer(
    undisturbed: Path, config: Path, tmp_path: Path, model: Trained
) -> None:
    """Another text makes another tokenizer, often of as many pieces."""
    there = read(config).data
    for file in config.parent.glob("*.txt"):
        (tmp_path / file.name).write_text(file.read_text("utf-8") + "changed = 1\n" * 40, "utf-8")
    words = [f"data.source={tmp_path}/*.txt", f"data.root={tmp_path}/corpora"]
    changed = load(undisturbed, words)
    with pytest.raises(ConfigError, match="was trained on another corpus"):
        changed.nats(SHORT)
    (old,) = Path(there.root).glob("*/tokenizer.model")
    again = load(undisturbed, [*words, f"data.tokenizer={old}"])
    assert again.nats(SHORT) == pytest.approx(model.nats(SHORT), rel=1e-6)


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def break_yaml(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: [1, {", encoding="utf-8")


def break_encoding(folder: Path) -> None:
    (folder / "config.yaml").write_bytes(b"run: {name: \xff}\n")


def make_a_list(folder: Path) -> None:
    (folder / "config.yaml").write_text("- 1\n", encoding="utf-8")


def widen(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text("utf-8").replace("dim: 32", "dim: 40"), encoding="utf-8")


def deepen(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text("utf-8").replace("layers: 2", "layers: 3"), encoding="utf-8")


def lose_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    path = folder / "config.yaml"
    if path.exists():
        named = re.sub("tokenizer: .*", "tokenizer: gone.model", path.read_text("utf-8"))
        path.write_text(named, encoding="utf-8")


def break_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer.*"):
        path.write_bytes(b"nothing")


def cut_weights(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])


def exchange_tokenizer(folder: Path) -> None:
    """For one of more pieces than the model has rows."""
    (folder / "tokenizer.model").write_bytes(tokenizers.train([TEXT * 2], 700).model)


DAMAGES = [
    (remove, "there is no such folder", "run import own export"),
    (empty, "holds no model", "run import own export"),
    (break_yaml, "not valid YAML", "run import"),
    (break_encoding, "not UTF-8", "run import"),
    (make_a_list, "must be a mapping", "run import"),
    (widen, "is of another model: ", "run import"),
    (deepen, "is of another model: blocks.2", "run import"),
    (lose_tokenizer, "tokenizer", "run import own export"),
    (break_tokenizer, "tokenizer", "import own export"),
    (exchange_tokenizer, "rows, the tokenizer", "import own export"),
    (cut_weights, "", "run import own export"),
]


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [(kind, damage, said) for damage, said, kinds in DAMAGES for kind in kinds.split()],
)
def test_a_damaged_folder_is_one_line(
    kind: str,
    damage: Callable[[Path], None],
    said: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders[kind], folder)
    damage(folder)
    assert main(["generate", str(folder), "def "]) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert said in line
    assert told.out == ""


def test_the_package_is_light_until_something_is_asked_of_it() -> None:
    code = "import sys, train, train.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        train.laod  # type: ignore[attr-defined]  # noqa: B018
