"""An instruct model stays one: on the way in, through a run, and on the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Made
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.tokens import tokenizer as tokenizers
from train.__main__ import main
from train.config import Config, read
from train.pretrained import adopt
from train.pretrained import export as exported
from train.pretrained import tokenizer as files
from train.pretrained.folder import find

pytestmark = pytest.mark.usefixtures("torch_code")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "user", "content": "if x: return 漢字"}, {"role": "assistant", "content": "ok"}]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


@pytest.fixture(scope="module", params=["in the config", "in a file", "several"])
def instruct(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small chat model as transformers saves it; its template is in one of three places."""
    import transformers

    made = Made(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=MARKS, initial_alphabet=letters)
    made.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        model_max_length=300,
    )
    fast.chat_template = TEMPLATE
    if request.param == "several":
        fast.chat_template = {"default": TEMPLATE, "tools": "{{ tools }}"}
    folder = tmp_path_factory.mktemp("instruct")
    fast.save_pretrained(folder, save_jinja_files=request.param != "in the config")
    assert (folder / "chat_template.jinja").exists() == (request.param != "in the config")
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=300,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 0], pad_token_id=3, temperature=0.7, do_sample=True
    )
    model.save_pretrained(folder)
    return folder


def check(folder: Path, wanted: Path, positions: int) -> None:
    """What transformers makes of `folder` chats as what it makes of `wanted`."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    there, here = (AutoTokenizer.from_pretrained(one) for one in (wanted, folder))
    for mark in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(here, mark) == getattr(there, mark), mark
    assert here.model_max_length == there.model_max_length
    for begin in (False, True):
        talks = [
            one.apply_chat_template(TALK, add_generation_prompt=begin)["input_ids"]
            for one in (there, here)
        ]
        assert talks[0] == talks[1]
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.to_dict() == GenerationConfig.from_pretrained(wanted).to_dict()
    assert generation.eos_token_id == [2, 0]
    config = AutoConfig.from_pretrained(folder)
    assert config.max_position_embeddings == positions
    assert (config.bos_token_id, config.pad_token_id) == (1, 3)
    assert config.eos_token_id == [2, 0]


def test_a_chat_survives_import_and_export(instruct: Path, tmp_path: Path) -> None:
    adopt.adopt(instruct, tmp_path / "ours", print)
    settings = read(tmp_path / "ours" / "config.yaml")
    held = tokenizers.load(Path(str(settings.data.tokenizer)))
    assert (held.bos_id, held.eos_id, held.pad_id) == (1, 2, 3)
    assert held.end_ids == {0, 2}
    exported.export(find(tmp_path / "ours"), tmp_path / "hf", "auto", "fp32", print)
    check(tmp_path / "hf", instruct, 300)
    # And a second time round.
    adopt.adopt(tmp_path / "hf", tmp_path / "again", print)
    exported.export(find(tmp_path / "again"), tmp_path / "hf2", "auto", "fp32", print)
    check(tmp_path / "hf2", instruct, 300)


def test_a_chat_survives_a_run_whose_import_is_gone(
    instruct: Path, tmp_path: Path, world: None
) -> None:
    """It is in the corpus, too. What was trained on longer sequences says so."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"{number} {TEMPLATE}\n" * 9, encoding="utf-8")
    ours = tmp_path / "ours"
    assert main(["import", str(instruct), "--to", str(ours)]) == 0
    words = [f"data.source={text}/*.txt", f"data.root={tmp_path}/corpora", "data.validation=0.2"]
    words += ["train.steps=3", "train.batch_tokens=512", "train.seq_len=64", "eval.tokens=512"]
    words += [f"run.root={tmp_path}/runs", "run.name=onward", "eval.sample_tokens=0"]
    words += ["data.stages=[{step: 2, seq_len: 400}]"]
    assert main([str(ours / "config.yaml"), *words]) == 0
    (corpus,) = (path for path in (tmp_path / "corpora").iterdir() if path.is_dir())
    assert tokenizers.load(corpus / "tokenizer.json").end_ids == {0, 2}
    run = tmp_path / "runs" / "onward"
    ours.rename(tmp_path / "moved")
    words = [f"data.tokenizer={corpus}/tokenizer.json"]
    exported.export(find(run, words), tmp_path / "hf", "auto", "fp32", print)
    check(tmp_path / "hf", instruct, 400)


@pytest.mark.parametrize(
    ("trained", "stages", "imported", "step", "wanted"),
    [
        (96, [], None, 8, 96),
        (96, [{"step": 4, "seq_len": 200}], None, 8, 200),
        (96, [{"step": 4, "seq_len": 200}], None, 4, 96),
        (96, [{"step": 4, "seq_len": 32}], None, 8, 96),
        (96, [{"step": 4, "seq_len": 200}], 300, 8, 300),
        (96, [{"step": 4, "seq_len": 400}], 300, 8, 400),
        # Not trained on, an import is as long as it was.
        (96, [{"step": 4, "seq_len": 400}], 50, None, 50),
        (96, [], None, None, 96),
    ],
)
def test_an_export_says_the_longest_sequence_that_its_weights_have_seen(
    trained: int, stages: list[Any], imported: int | None, step: int | None, wanted: int
) -> None:
    config = Config()
    config.train.seq_len, config.data.stages = trained, stages
    config.model.max_positions = imported
    assert exported.positions(config, step) == wanted


def test_a_sentencepiece_model_keeps_its_chat_as_a_fast_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    pieces = tokenizers.train([Path(__file__).read_text(encoding="utf-8")], 500)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "tokenizer.model").write_bytes(pieces.model)
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "chat_template": template}
    settings |= {"eos_token": {"content": "</s>", "__type": "AddedToken"}, "pad_token": "<unk>"}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    found = files.find(tmp_path / "in", 500, print)
    assert found is not None
    files.write(found, tmp_path / "out", print)
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.chat_template == template
    assert theirs.pad_token == "<unk>"
    talk = theirs.apply_chat_template(TALK, add_special_tokens=False)["input_ids"]
    words = [[*pieces.encode(str(part["content"])), pieces.eos_id] for part in TALK]
    assert talk == [token for part in words for token in part]
