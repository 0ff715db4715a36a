from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch", reason="only training needs PyTorch")
if shutil.which("g++") is None:
    pytest.skip("only training needs a C++ compiler", allow_module_level=True)

from demo_model.attention import attend  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402


@pytest.mark.parametrize("length", [1, 63, 64, 150])
def test_attention_and_its_gradients_are_those_of_pytorch(length: int) -> None:
    torch.manual_seed(1)
    ours = [(2 * torch.randn(2, 3, length, 32)).requires_grad_() for _ in range(3)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    mixed, _ = attend(*ours)
    query, key, value = theirs
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    gradient = torch.randn_like(mixed)
    mixed.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=2e-4)
