"""What the planner counts of an op: its arguments are found by name, so their order in the schema does not matter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pcs_kernels
from pcs_kernels import costs

OPS = torch.ops.pcs_kernels
R = torch.randn


@pytest.fixture(scope="module")
def turned():
    """One product under two schemas that differ in the order of their arguments."""
    library = torch.library.Library("pcs_costs_test", "FRAGMENT")
    for name, order in (("straight", "Tensor x, Tensor weight"), ("turned", "Tensor weight, Tensor x")):
        library.define(f"{name}({order}) -> Tensor")
    yield torch.ops.pcs_costs_test
    library._destroy()


def test_a_changed_order_of_arguments_counts_the_same_tensors(turned):
    def flops(x, weight, result):
        return 2 * x.shape[0] * weight.numel() + 1000 * result.numel()

    x, weight, y = R(7, 3), R(5, 3), R(7, 5)
    wanted = flops(x, weight, y)
    assert costs.by_name(turned.straight, flops)(x, weight, out_val=y) == wanted
    assert costs.by_name(turned.turned, flops)(weight, x, out_val=y) == wanted
    assert costs.by_name(turned.turned, flops)(weight, x=x, out_val=y) == wanted
    assert costs.argument(turned.straight, "weight", (x, weight), {}) is weight
    assert costs.argument(turned.turned, "weight", (weight, x), {}) is weight


def test_a_renamed_argument_is_an_error_and_no_other_tensor(turned):
    with pytest.raises(ValueError, match=r"no argument 'wait'.*Tensor weight, Tensor x"):
        costs.by_name(turned.turned, lambda wait: wait.numel())


def test_every_formula_and_every_packed_weight_is_named_in_its_schema():
    assert {str(packet).removeprefix("pcs_kernels.") for packet in costs.formulas()} == {
        f"{op}_{way}"
        for op in ("cross_attention", "self_attention", "lowrank_residual", "frozen_conv2d", "frozen_linear")
        for way in ("forward", "backward")
    }
    for packet, name in costs._packed_names().items():
        assert name in {a.name for a in packet.default._schema.arguments}


# batch 2, 3 heads, 5 queries, 7 tokens, width 8; products of 10 rows, 6 inputs, 4 outputs; a 3x3 convolution on 5x4
COUNTED = {
    "cross_attention": (lambda: pcs_kernels.cross_attention(*attention())[0], 4 * 2 * 3 * 5 * 7 * 8, 2.5),
    "self_attention": (lambda: pcs_kernels.self_attention(*attention()), 4 * 2 * 3 * 5 * 7 * 8, 2.5),
    "lowrank_residual": (lambda: pcs_kernels.lowrank_residual(*product(), None, R(2, 6), R(4, 2)), 2 * 10 * 6 * 4, 1),
    "frozen_linear": (lambda: pcs_kernels.frozen_linear(*product()), 2 * 10 * 6 * 4, 1),
    "frozen_conv2d": (lambda: pcs_kernels.frozen_conv2d(leaf(1, 3, 5, 4), R(6, 3, 3, 3)), 2 * 20 * 6 * 3 * 9, 1),
}


def leaf(*shape):
    return R(shape, requires_grad=True)


def attention():
    return leaf(2, 3, 5, 8), leaf(2, 3, 7, 8), leaf(2, 3, 7, 8)


def product():
    return leaf(2, 5, 6), R(4, 6)


@pytest.mark.parametrize("name", COUNTED)
def test_products_are_counted_by_two_flops_a_multiply_add(name):
    """The forward's FLOPs, and the backward's as a multiple of them."""
    call, forward, times = COUNTED[name]
    with pcs_kernels.backend("reference"), FlopCounterMode(display=False, custom_mapping=costs.formulas()) as counter:
        y = call()
        assert counter.get_total_flops() == forward
        y.sum().backward()
        assert counter.get_total_flops() == forward * (1 + times)


def test_the_packed_weight_is_the_weight_in_both_directions():
    weight, x, dy = R(4, 6), R(2, 5, 6), R(2, 5, 4)
    for call in (
        (OPS.frozen_linear_forward, (x, weight, None, True, "")),
        (OPS.frozen_linear_backward, (dy, weight, True, "")),
    ):
        packed, size = costs.packed_weight(*call, {})
        assert packed is weight and size == weight.nbytes
    adapters = R(2, 6), R(4, 2), None, 1.0, None
    forward, backward = OPS.lowrank_residual_forward, OPS.lowrank_residual_backward
    for pack in (True, False):  # one that is made for the call is not kept
        for call in (
            (forward, (x, weight, None, *adapters, pack, "")),
            (backward, (dy, x, weight, *adapters, *[True] * 6, pack, "")),
        ):
            found = costs.packed_weight(*call, {})
            assert (found[0] is weight and found[1] >= weight.nbytes) if pack else found is None
    assert costs.packed_weight(OPS.geglu_forward, (x, ""), {}) is None
    assert costs.packed_weight(torch.ops.aten.mm, (x, weight), {}) is None
