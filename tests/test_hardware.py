"""What is said of a machine and of the work that it is given."""

import pytest
import torch
import torch.nn.functional as F

from nar_t2i.hardware import operation_counter


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_is_two_products_of_matrices_wherever_it_is_counted(device, grad):
    q, k = torch.randn(2, 3, 64, 16, device=device), torch.randn(2, 3, 77, 16, device=device)
    masks = (None, torch.ones(2, 1, 1, 77, dtype=torch.bool, device=device))
    for mask in masks:
        with torch.set_grad_enabled(grad), operation_counter() as counter:
            F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
            torch.randn(5, 7, device=device) @ torch.randn(7, 11, device=device)
        assert counter.get_total_flops() == 2 * 2 * (2 * 3) * 64 * 77 * 16 + 2 * 5 * 7 * 11
