"""One trained model in folders of every kind, for what loads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from data.tokens import tokenizer as tokenizers
from train import Trained, load
from train.__main__ import main
from train.survival import manifest


@pytest.fixture(scope="session")
def folders(
    undisturbed: Path, config: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One model in folders of every kind."""
    made = tmp_path_factory.mktemp("folders")
    run = Path(shutil.copytree(undisturbed, made / "tiny"))
    export, own, ours, moved = (made / name for name in ("export", "own", "import", "moved"))
    assert main(["export", str(run), "--to", str(export)]) == 0
    assert main(["export", str(run), "--to", str(own), "--as", "headrace"]) == 0
    assert main(["import", str(export), "--to", str(made / "elsewhere")]) == 0
    (made / "elsewhere").rename(moved)
    assert main(["import", str(own), "--to", str(ours)]) == 0
    newest = manifest.published(run / manifest.CHECKPOINTS)[0]
    file = made / "tiny.yaml"
    settings = config.read_text(encoding="utf-8")
    file.write_text(f"{settings}\nrun: {{root: {made}}}\n", encoding="utf-8")
    return {
        "run": run,
        "checkpoint": newest,
        "file": file,
        "export": export,
        "own": own,
        "import": ours,
        "moved": moved,
    }


@pytest.fixture(scope="session")
def model(undisturbed: Path) -> Trained:
    return load(undisturbed)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves it, with more rows than its tokenizer has pieces."""
    import transformers

    pieces = tokenizers.train([Path(__file__).read_text(encoding="utf-8")], 520)
    config = transformers.LlamaConfig(
        vocab_size=pieces.vocab_size + 7,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        max_position_embeddings=64,
    )
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / pieces.file).write_bytes(pieces.model)
    return folder
