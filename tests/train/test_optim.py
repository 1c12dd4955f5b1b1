"""AdamW and the schedule."""

import gc
import math
import weakref

import pytest
import torch

from hpsafety.config import SFTConfig
from hpsafety.train.distributed import World
from hpsafety.train.optim import AdamW, decays, learning_rate
from tests.tiny import tiny_model

ALONE = World(0, 1, torch.device("cpu"))


def test_schedule():
    """SFT-5: 2e-5 at step 0, the cosine at three probe steps within 1e-9, a tenth at the end."""
    total, peak = 101, 2e-5
    assert learning_rate(0, total, peak) == peak
    for t in (25, 50, 99):
        expected = peak * (0.55 + 0.45 * math.cos(math.pi * t / 100))
        assert abs(learning_rate(t, total, peak) - expected) < 1e-9
    assert abs(learning_rate(100, total, peak) - 0.1 * peak) < 1e-12


def test_warmup():
    assert [learning_rate(t, 10, 1.0, 4) for t in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(4, 10, 1.0, 4) == 1.0
    assert learning_rate(9, 10, 1.0, 4) == pytest.approx(0.1)
    assert learning_rate(1, 2, 1.0, 5) == 1.0, "warm-up longer than the run ends with it"
    assert learning_rate(0, 1, 1.0) == 1.0


def test_defaults():
    """SFT-5: the paper's constants."""
    cfg = SFTConfig(model="m", data=("d",), out="o")
    assert (cfg.lr, cfg.batch, cfg.epochs, cfg.weight_decay) == (2e-5, 64, 2, 0.1)
    assert (cfg.beta1, cfg.beta2, cfg.eps, cfg.clip, cfg.warmup) == (0.9, 0.95, 1e-5, 1.0, 0)


def test_decay_is_off_norms_and_biases():
    model = tiny_model(qkv_bias=True, o_bias=True, mlp_bias=True)
    off = {name.split(".")[-1] for name, _ in model.named_parameters() if not decays(name)}
    assert off == {"norm", "attn_norm", "mlp_norm", "qkv_bias", "o_bias", "gate_up_bias", "down_bias"}


def test_matches_torch_adamw():
    """Ten clipped steps against torch's own AdamW and clip_grad_norm_."""
    ours, theirs = tiny_model(seed=1), tiny_model(seed=1)
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if decays(n) == flag], "weight_decay": 0.1 * flag}
        for flag in (True, False)
    ]
    optimizer, reference = AdamW(ours), torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-5)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in reference.param_groups:
            group["lr"] = 1e-2
        reference.step()
        norm = optimizer.step(1e-2, ALONE)
        torch.testing.assert_close(norm.float(), expected, rtol=1e-6, atol=0)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_non_finite_gradients_change_nothing():
    model = tiny_model()
    optimizer = AdamW(model)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    assert not torch.isfinite(optimizer.step(1e-2, ALONE))
    assert int(optimizer.step_count) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_bf16_keeps_fp32_masters():
    """Steps too small for bf16 add up in the masters; the model's weights are their rounded copies."""
    model = tiny_model()
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = AdamW(model, torch.bfloat16, weight_decay=0.0)
    for _ in range(8):
        optimizer.zero_grad()
        sum((p.float() ** 2).sum() for p in model.parameters()).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step(1e-6, ALONE)
    for (name, p), master in zip(model.named_parameters(), optimizer.masters, strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, master.bfloat16()), name
        moved = (master - first[name]).abs()
        assert 0 < float(moved.max()) < 1e-5, name


def test_bf16_gradients_add_up_in_fp32_and_start_anew_each_step():
    """A step's first gradient is copied over the last step's; a parameter that gets none in a step counts as zero."""
    model = tiny_model()
    optimizer = AdamW(model, torch.bfloat16)
    first, second = optimizer.params[:2]
    for step in range(2):
        optimizer.zero_grad()
        for factor in (1.0, 2.0**-9):  # the second is lost in bf16: 1 + 2^-9 rounds to 1
            (factor * first.float().sum()).backward()
        if step == 0:
            second.float().sum().backward()
        grads = optimizer._gradients()
        assert torch.equal(grads[0], torch.full_like(grads[0], 1 + 2.0**-9))
        assert torch.equal(grads[1], torch.full_like(grads[1], 1.0 - step))
        assert all(not g.any() for g in grads[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outlives_a_run(dtype):
    """A demo or a pipeline trains several models in one process: each leaves memory with its last reference."""
    model = tiny_model()
    optimizer = AdamW(model, dtype)
    seen = [weakref.ref(x) for x in (model, optimizer, model.embed, optimizer.masters[0])]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4
