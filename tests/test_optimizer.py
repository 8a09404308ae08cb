"""AdamW with 8-bit states: it trains, its states are bitsandbytes', its rounding is unbiased and repeats."""

import copy
import warnings

import pytest
import torch
from optimizer_cases import batches, network

import pcs_kernels
from pcs_kernels.ops.adamw8bit import codes, reference
from pcs_kernels.optim import AdamW8bit
from tests import needs

bitsandbytes = pytest.importorskip("bitsandbytes")
MAPS = codes.code_map(True), codes.code_map(False)


def train(net, opt, steps: int) -> list[float]:
    losses = []
    for x, y in batches(steps):
        loss = torch.nn.functional.mse_loss(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
def test_200_steps_track_torch(backend):
    ours, theirs = network(), network()
    settings = dict(lr=2e-3, weight_decay=1e-2)
    with pcs_kernels.backend(backend):
        found = train(ours, AdamW8bit(ours.parameters(), min_8bit_size=4096, **settings), 200)
    expected = train(theirs, torch.optim.AdamW(theirs.parameters(), **settings), 200)
    assert expected[-1] < 0.3 * expected[0]  # it has learned something, or the comparison says nothing
    assert sum(found[-20:]) == pytest.approx(sum(expected[-20:]), rel=0.01)  # codes of 8 bits cost less than 1 % of it


def state_of(values: torch.Tensor, signed: bool):
    code, absmax = codes.encode(values, codes.code_map(signed), 256)
    return code, absmax


def test_maps_are_those_of_bitsandbytes():
    for signed in (True, False):
        assert torch.equal(codes.code_map(signed), bitsandbytes.functional.create_dynamic_map(signed))


@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
def test_states_equal_bitsandbytes_within_one_code(backend):
    """One step from the same states. bitsandbytes' CPU quantiser looks values up in a table of step 3e-5, so codes of
    values below that share of their block are held against exact nearest codes instead."""
    torch.manual_seed(0)
    n = 256 * 40 + 17
    values, gradient = torch.randn(n), torch.randn(n) * torch.logspace(-3, 0, n)
    ours, theirs = (torch.nn.Parameter(values.clone()) for _ in range(2))
    a = AdamW8bit([ours], lr=1e-2, weight_decay=0.1)
    b = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        b.step()
        with pcs_kernels.backend(backend):
            a.step()
        gradient = torch.randn(n) * torch.logspace(-3, 0, n)
        found, expected = a.state[ours], b.state[theirs]
        for number, signed in ((1, True), (2, False)):
            scale = expected[f"absmax{number}"]
            torch.testing.assert_close(found[f"absmax{number}"], scale, rtol=1e-5, atol=0)  # float32 roundings of a sum
            code, wanted = found[f"state{number}"].int(), expected[f"state{number}"].int()
            share = codes.code_map(signed)[wanted.long()].abs()
            coarse = share < (1e-3 if signed else 1e-4)
            # where a value is nearly halfway between two codes: under 2 in 100
            assert int((code - wanted).abs()[~coarse].max()) <= 1
            assert float((code != wanted)[~coarse].float().mean()) < 0.02
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        a.load_state_dict(b.state_dict())  # the next step starts from the same states
        ours.data.copy_(theirs.data)


@needs.native
@pytest.mark.parametrize("signed", (True, False))
def test_native_codes_are_the_nearest(signed):
    """Every value of a fine grid, coded by one native step and by the reference."""
    grid = torch.cat([torch.logspace(-9, 0, 20_000), torch.linspace(0, 1, 20_000)])
    grid = torch.cat([grid, -grid]) if signed else grid
    grid = torch.cat([torch.ones(1), grid])[: 256 * (grid.numel() // 256)]
    whole = grid.numel() // 256 * 256
    grid = grid[:whole].view(-1, 256)
    grid[:, 0] = 1.0  # every block's largest value, so that the grid is not rescaled
    grid = grid.flatten()
    expected, _ = codes.encode(grid, codes.code_map(signed), 256)
    p, zero = torch.zeros(whole), torch.full((whole,), 127, dtype=torch.uint8)
    m, v = zero.clone(), torch.zeros(whole, dtype=torch.uint8)
    absmax = [torch.zeros(whole // 256) for _ in range(2)]
    gradient = grid if signed else grid.sqrt()
    with pcs_kernels.backend("native"):
        numbers = 0.0, 0.0, 0.0, 1e-8, 0.0, 1, 256, 1.0, None, True  # no rate and no memory: m and v are the grid
        pcs_kernels.ops.adamw8bit.step_8bit(p, gradient, m, v, *absmax, *MAPS, *numbers)
    difference = ((m if signed else v).int() - expected.int()).abs()
    # a value that is halfway between two codes but for a float32 rounding may take either: 2 in 1000 of this grid
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 0.002


def test_state_dicts_travel_both_ways():
    ours, theirs = network(), network()
    a = AdamW8bit(ours.parameters(), lr=1e-3)
    b = bitsandbytes.optim.AdamW8bit(theirs.parameters(), lr=1e-3)
    train(ours, a, 3)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    theirs.load_state_dict(ours.state_dict())
    for x, y in batches(1):
        for net, opt in ((ours, a), (theirs, b)):
            opt.zero_grad()
            torch.nn.functional.mse_loss(net(x), y).backward()
            opt.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    fresh = AdamW8bit(network().parameters())
    fresh.load_state_dict(b.state_dict())
    assert fresh.param_groups[0]["lr"] == 1e-3
    kept = [s["state1"].dtype for s in fresh.state.values()]
    assert kept == [torch.uint8, torch.float32, torch.uint8, torch.float32]


def test_own_state_dict_resumes_bit_for_bit(tmp_path):
    straight, resumed = network(), network()
    opt = AdamW8bit(straight.parameters())
    train(straight, opt, 10)
    opt = AdamW8bit(resumed.parameters())
    both = list(batches(10))
    for i, (x, y) in enumerate(both):
        if i == 5:
            torch.save({"net": resumed.state_dict(), "opt": opt.state_dict()}, tmp_path / "half.pt")
            half = torch.load(tmp_path / "half.pt", weights_only=True)
            resumed = network(seed=9)
            resumed.load_state_dict(half["net"])
            opt = AdamW8bit(resumed.parameters(), lr=1.0)
            opt.load_state_dict(half["opt"])
        opt.zero_grad()
        torch.nn.functional.mse_loss(resumed(x), y).backward()
        opt.step()
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_dict_that_does_not_fit_is_refused():
    a = AdamW8bit([torch.nn.Parameter(torch.randn(5000))])
    a.param_groups[0]["params"][0].grad = torch.randn(5000)
    a.step()
    saved = a.state_dict()
    with pytest.raises(ValueError, match="state1 of parameter 0 does not fit"):
        AdamW8bit([torch.nn.Parameter(torch.randn(5001))]).load_state_dict(saved)
    with pytest.raises(ValueError, match="absmax1 of parameter 0 must hold 10 blocks of 512"):
        AdamW8bit([torch.nn.Parameter(torch.randn(5000))], block_size=512).load_state_dict(saved)
    with pytest.raises(ValueError, match="parameter groups"):
        AdamW8bit([torch.nn.Parameter(torch.randn(5000)) for _ in range(2)]).load_state_dict(saved)


# (dtype, a value of it, the next one above); float16 is subnormal below 6.1e-5, in steps of 6e-8
NEIGHBOURS = {
    "bfloat16": (torch.bfloat16, 1.0, 1.0 + 2**-7),
    "float16": (torch.float16, 1.0, 1.0 + 2**-10),
    "float16, negative": (torch.float16, -0.25 - 2**-12, -0.25),
    "float16, subnormal": (torch.float16, 3 * 2**-24, 4 * 2**-24),
    "float16, from zero": (torch.float16, 0.0, 2**-24),
}


@pytest.mark.parametrize("case", NEIGHBOURS)
def test_stochastic_rounding_is_unbiased_and_repeats(case):
    dtype, low, high = NEIGHBOURS[case]
    value = torch.full((200_000,), low + 0.3 * (high - low))  # three tenths of the way between two numbers

    def rounded_by(seed, step):
        return reference.round_stochastically(value, reference.step_key(seed, step, value.device), dtype)

    rounded = rounded_by(3, 1)
    up = float((rounded.float() == high).float().mean())
    assert rounded.dtype is dtype and set(rounded.unique().tolist()) == {low, high}
    assert up == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 2e5) ** 0.5)  # four standard deviations of 200,000 draws
    assert torch.equal(rounded, rounded_by(3, 1))
    assert not torch.equal(rounded, rounded_by(3, 2))
    assert not torch.equal(rounded, rounded_by(4, 1))
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    found = reference.round_stochastically(special, reference.step_key(0, 1, special.device), dtype)
    assert torch.equal(found[[0, 1, 3]], special[[0, 1, 3]].to(dtype)) and found[2].isnan()


def test_every_number_of_16_bits_stays_as_it_is():
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        found = reference.round_stochastically(every.float(), reference.step_key(5, 2, every.device), dtype)
        assert bool(((found == every) | (found.isnan() & every.isnan())).all())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_small_updates_of_16_bits_are_not_lost(dtype):
    """Updates under half a unit in the last place move the mean, where rounding to nearest stands still."""
    moved = {}
    rate = 2e-4 if dtype == torch.bfloat16 else 1e-4  # half a unit below 1 is 2e-3 and 2.4e-4
    for seed in (0, None):
        p = torch.nn.Parameter(torch.ones(8192, dtype=dtype))
        opt = AdamW8bit([p], lr=rate, weight_decay=0.0, seed=seed)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            opt.step()
        moved[seed] = 1 - float(p.detach().float().mean())
    assert moved[0] == pytest.approx(100 * rate, rel=0.1)  # the mean of 8192 draws of 100 steps, and to spare
    assert moved[None] == 0


@pytest.mark.parametrize("size", (0.02, 0.05, 0.2, 1.0))
def test_float16_weights_go_as_far_as_float32_ones(size):
    """At DreamBooth's rate, weights of any size; rounded to nearest they go 54, 24, 6 and 1 % of the way."""
    torch.manual_seed(0)
    start = (torch.randn(20_000) * size).half()
    way = {}
    for dtype in (torch.float32, torch.float16):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        opt = AdamW8bit([p], lr=5e-6, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        drift = torch.randn(start.shape, generator=generator)  # what the gradients have in common
        for _ in range(50):
            p.grad = (drift + torch.randn(start.shape, generator=generator)).to(dtype)
            opt.step()
        way[dtype] = p.detach().float() - start.float()
    covered = float(way[torch.float16] @ way[torch.float32] / way[torch.float32].square().sum())
    # rounding adds 4e-4 a weight at size 1 in 50 steps of 5e-6: four standard deviations of 20,000 weights' mean
    assert covered == pytest.approx(1, abs=0.05)


@needs.native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("grad_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("n", (5000, 256 * 33, 37))
def test_native_equals_reference(dtype, grad_dtype, n):
    if dtype == torch.float32 and grad_dtype == torch.bfloat16:
        pytest.skip("gradients have the parameter's dtype or float32")
    found = {}
    for backend in ("reference", "native"):
        torch.manual_seed(0)
        p = torch.randn(n).to(dtype)
        size = codes.blocks(n, 256)
        state = [
            torch.full((n,), 127, dtype=torch.uint8),
            torch.zeros(n, dtype=torch.uint8),
            torch.zeros(size),
            torch.zeros(size),
        ]
        with pcs_kernels.backend(backend):
            for step in range(1, 4):
                g = torch.randn(n).to(grad_dtype)
                numbers = 1e-3, 0.9, 0.999, 1e-8, 1e-2, step, 256, 0.5, 11, False
                pcs_kernels.ops.adamw8bit.step_8bit(p, g, *state, *MAPS, *numbers)
        found[backend] = p
    unit = 2**-8 if dtype == torch.bfloat16 else 1e-5
    difference = (found["native"].float() - found["reference"].float()).abs()
    assert float(difference.max()) <= unit * float(found["reference"].float().abs().max())
    assert float((difference > 0).float().mean()) < (0.02 if dtype == torch.bfloat16 else 1.0)


def test_decay_after_the_update_is_bitsandbytes_on_cuda():
    p, g = torch.randn(64), torch.randn(64)
    for first in (True, False):
        q = p.clone()
        pcs_kernels.ops.adamw8bit.step_32bit(
            q, g, torch.zeros(64), torch.zeros(64), 0.1, 0.0, 0.0, 0.0, 0.5, 1, 1.0, None, first
        )
        update = 0.1 * g.sign()
        torch.testing.assert_close(q, p * 0.95 - update if first else (p - update) * 0.95)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(lr=-1), "lr must be"),
        (dict(lr=float("nan")), "lr must be"),
        (dict(betas=(0.9, 1.0)), "betas must be"),
        (dict(block_size=100), "block_size must be a power of two"),
        (dict(weight_decay=-0.1), "weight_decay must be"),
    ],
)
def test_bad_settings_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdamW8bit([torch.nn.Parameter(torch.randn(4))], **arguments)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("channels", (4, 40))
def test_channels_last_parameters_step_in_their_own_memory(channels, dtype):
    """The step of a channels-last weight is that of the same memory seen as a plain tensor, bit for bit."""
    value = torch.randn(channels, channels, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    last = torch.nn.Parameter(value.clone())
    plain = torch.nn.Parameter(value.permute(0, 2, 3, 1).clone())
    a, b = AdamW8bit([last]), AdamW8bit([plain])
    for form in (torch.channels_last, torch.contiguous_format):  # a gradient may come either way
        gradient = torch.randn(value.shape, dtype=dtype)
        last.grad, plain.grad = gradient.contiguous(memory_format=form), gradient.permute(0, 2, 3, 1).contiguous()
        a.step()
        b.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last.permute(0, 2, 3, 1), plain)
    again = AdamW8bit([torch.nn.Parameter(value.clone())])
    again.load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match="another memory format"):
        AdamW8bit([torch.nn.Parameter(value.contiguous())]).load_state_dict(a.state_dict())


def test_other_memory_formats_are_refused_with_a_mend():
    p = torch.nn.Parameter(torch.randn(8, 8).T)
    p.grad = torch.randn_like(p)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"param must be contiguous\. Fix"):
        AdamW8bit([p]).step()


@pytest.mark.parametrize("size", [16, 8192])
def test_a_step_is_seen_by_whoever_keeps_copies_of_the_weight(size):
    """The packed copies that kernels keep, and autograd's checks, go by the tensor's version."""
    p = torch.nn.Parameter(torch.randn(size))
    opt = AdamW8bit([p])
    p.grad = torch.ones_like(p)
    before = p._version
    opt.step()
    assert p._version > before


def test_a_residual_trained_by_this_optimizer_is_the_one_that_is_used():
    x, weight = torch.randn(2, 9, 64), torch.randn(64, 64)
    down, up = torch.nn.Parameter(torch.randn(8, 64)), torch.nn.Parameter(torch.zeros(64, 8))
    opt = AdamW8bit([down, up], lr=0.1)
    for _ in range(3):
        pcs_kernels.lowrank_residual(x, weight, None, down, up).square().sum().backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        y = pcs_kernels.lowrank_residual(x, weight, None, down, up)
        torch.testing.assert_close(y, x @ weight.T + (x @ down.T) @ up.T, rtol=1e-4, atol=1e-3)
