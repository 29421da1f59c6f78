"""`linear_cross_entropy` against logits, log-softmax and a sum."""

import pytest
import torch

from kernels import linear_cross_entropy, token_cross_entropy
from kernels.cross_entropy import CHUNK_LOGITS, IGNORED
from tests.kernels.agreement import (
    BACKENDS,
    assert_agrees,
    assert_close,
    device_of,
)


def definition(hidden, weight, labels, z_loss):
    target = labels != IGNORED
    logits = hidden[target] @ weight.t()
    chosen = torch.log_softmax(logits, 1).gather(1, labels[target, None])
    return -chosen.sum() + z_loss * logits.logsumexp(1).square().sum(), -chosen.sum()


def labels_of(T, V, ignored):
    labels = torch.randint(0, V, (T,))
    labels[torch.rand(T) < ignored] = IGNORED
    return labels


@pytest.fixture(params=[1 << 26, 1 << 10], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    for device in CHUNK_LOGITS:
        monkeypatch.setitem(CHUNK_LOGITS, device, request.param)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("T", "D", "V", "ignored"),
    [
        (0, 7, 13, 0.0),
        (1, 7, 13, 0.0),
        (3, 7, 13, 1.0),
        (63, 7, 13, 0.0),
        (65, 33, 300, 0.4),
        (9, 16, 2050, 0.3),
    ],
)
def test_loss_and_gradients_are_those_of_the_logits(
    backend, dtype, T, D, V, ignored, chunks, poisoned_memory
):
    torch.manual_seed(T + V)
    labels = labels_of(T, V, ignored)
    hidden = torch.randn(T, D, dtype=torch.float64)
    hidden[labels == IGNORED] = float("nan")
    device = device_of(backend)

    def op(hidden, weight):
        loss, cross_entropy = linear_cross_entropy(
            hidden, weight, labels.to(device), z_loss=0.01, backend=backend
        )
        assert not cross_entropy.requires_grad
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(cross_entropy, definition(*exact, labels, 0)[1], dtype, "cross_entropy")
        return loss / max(T, 1)

    weight = torch.randn(V, D, dtype=torch.float64)
    exact = [x.to(dtype).double() for x in (hidden, weight)]
    assert_agrees(
        op,
        lambda hidden, weight: definition(hidden, weight, labels, 0.01)[0] / max(T, 1),
        {"hidden": hidden, "weight": weight},
        dtype=dtype,
        device=device,
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("T", [0, 1, 65])
def test_tokens_get_their_own_cross_entropy(backend, dtype, T, chunks, poisoned_memory):
    torch.manual_seed(0)
    labels = labels_of(T, 300, 0.3)
    hidden, weight = (torch.randn(n, 16, dtype=torch.float64).to(dtype) for n in (T, 300))
    device = device_of(backend)
    losses, likeliest = token_cross_entropy(
        hidden.to(device), weight.to(device), labels.to(device), backend=backend
    )
    log_softmax = torch.log_softmax(hidden.double() @ weight.double().t(), 1)
    expected = -log_softmax.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    expected[labels == IGNORED] = 0
    assert torch.equal(likeliest.cpu(), log_softmax.argmax(1) == labels)
    assert losses.dtype == torch.float32
    assert_close(losses, expected, max(dtype, torch.float32, key=lambda d: d.itemsize == 4), "ce")


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_logits_of_any_size_stay_finite(backend, dtype):
    device = device_of(backend)
    hidden = torch.tensor([[200.0], [-200.0]], device=device, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[200.0], [0.0], [-200.0]], device=device, dtype=dtype)
    weight.requires_grad_()
    labels = torch.tensor([2, 2], device=device)
    loss, _ = linear_cross_entropy(hidden, weight, labels, backend=backend)
    loss.backward()
    assert loss.item() == 80000.0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_without_grad_no_gradient_is_computed(monkeypatch):
    """The gradient is what needs a second product with the weight."""
    products = []
    monkeypatch.setattr("kernels.cross_entropy._add_product", lambda *_: products.append(1))
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels = torch.arange(5)
    with torch.no_grad():
        evaluated, _ = linear_cross_entropy(hidden, weight, labels)
    assert not products
    trained, _ = linear_cross_entropy(hidden, weight, labels)
    assert products
    assert torch.allclose(evaluated, trained)


def test_the_logits_are_never_whole():
    """10⁹ logits would take 4 GB; the process may grow by a tenth of that."""
    import resource

    T, V = 16384, 65536
    hidden, weight = torch.randn(T, 2), torch.randn(V, 2)
    labels = torch.full((T,), IGNORED)
    labels[:: T // 256] = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    linear_cross_entropy(hidden, weight, labels)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(5, 3), torch.zeros(3).long(), "weight"),
        (torch.zeros(3, 4), torch.zeros(5, 4).half(), torch.zeros(3).long(), "one floating dtype"),
        (torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2).long(), "labels must be"),
        (torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 5, 1]), "from 0 to 4; got 5"),
        (torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, -1, 1]), "got -1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(hidden, weight, labels, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels)
