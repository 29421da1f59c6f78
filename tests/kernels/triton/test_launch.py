"""What is computed before a kernel is launched: the assembler's path, and where chunks lie."""

from types import SimpleNamespace

import pytest
import torch

from kernels.triton.launch import sound_assembler
from kernels.triton.layout import lay_out


def tool(version):
    return SimpleNamespace(path=f"/ptxas-{version}", version=version)


@pytest.mark.parametrize(
    ("own", "newer", "chosen"),
    [("13.4", "13.4", "13.4"), ("12.8", "13.1", "13.1"), ("13.2", "13.1", "13.2")],
)
def test_hopper_gets_an_assembler_that_is_safe(own, newer, chosen):
    assert sound_assembler(tool(own), tool(newer)) == f"/ptxas-{chosen}"


def test_without_a_safe_assembler_nothing_runs_on_hopper():
    with pytest.raises(RuntimeError, match=r"ptxas 12\.8, which gives wrong gradients; install"):
        sound_assembler(tool("12.8"), tool("13.0"))


CPU = torch.device("cpu")


def test_layers_share_a_layout_until_the_sequences_change():
    cu_seqlens = torch.tensor([0, 100, 300])
    layout = lay_out(1, 300, cu_seqlens, CPU)
    assert lay_out(1, 300, cu_seqlens, CPU) is layout
    assert layout.chunks[:6].tolist() == [
        [0, 64], [64, 36], [100, 64], [164, 64], [228, 64], [292, 8],
    ]  # fmt: skip
    cu_seqlens[1] = 64
    changed = lay_out(1, 300, cu_seqlens, CPU)
    assert changed.chunks[:5].tolist() == [[0, 64], [64, 64], [128, 64], [192, 64], [256, 44]]
    # Equal sequences in another tensor are laid out for themselves, and for another length too.
    assert lay_out(1, 300, cu_seqlens.clone(), CPU) is not changed
    assert len(lay_out(1, 400, cu_seqlens, CPU).chunks) > len(changed.chunks)
