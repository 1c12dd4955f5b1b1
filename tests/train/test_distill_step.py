"""The distillation loss on packed prompt groups against a dense fp64 computation: transformers' own model in double,
every response alone behind its prompt, full logits.

The bug this file must catch: teacher rows that stand one token, or one response, beside the student's.
"""

import dataclasses

import pytest
import torch
from torch.nn.functional import log_softmax

from hpsafety import ops
from hpsafety.data.groups import PromptGroup, pack
from hpsafety.model.io import save_model
from hpsafety.model.names import hf_names, split
from hpsafety.model.tokenizer import Tokenizer
from hpsafety.train.distill_step import DistillGroup, distill_group, divergence_loss
from hpsafety.train.distributed import World
from hpsafety.train.finetune import count_trained, encode
from hpsafety.train.optim import AdamW
from hpsafety.train.step import train_step
from tests.stages.conftest import TEMPLATE, tiny_tokenizer
from tests.tiny import random_groups, tiny_model

ALONE = World(0, 1, torch.device("cpu"))
KINDS = ("forward_kl", "reverse_kl", "jsd")


def make_groups(count=5, k=3, seed=0) -> list[DistillGroup]:
    """Students' and teachers' prompts of different lengths before the same responses, of which some tokens are not
    trained."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for group, other in zip(random_groups(count, k, seed), random_groups(count, 1, seed + 1), strict=True):
        train = [(torch.rand(len(r), generator=g) < 0.8).tolist() for r in group.responses]
        train[0][0] = True
        behind = PromptGroup([*other.prompt, *group.prompt], group.responses, train)
        out.append(DistillGroup(group.prompt, group.responses, train, teacher=behind))
    return out


def dense(path, groups, teacher_path, kind):
    """(loss, gradients by Hugging Face name) in fp64: full logits, a copy of the prompt per response."""
    transformers = pytest.importorskip("transformers")
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64, attn_implementation="eager")
        for p in (path, teacher_path)
    )
    total, count = 0.0, 0
    for group in groups:
        for response, mask in zip(group.responses, group.train, strict=True):
            rows = torch.tensor(mask).nonzero()[:, 0] - 1

            def logs(model, prompt, response=response, rows=rows):
                logits = model(torch.tensor([[*prompt, *response]])).logits[0]
                return log_softmax(logits[rows + len(prompt)], -1)

            logq = logs(student, group.prompt)
            with torch.no_grad():
                logp = logs(teacher, group.teacher.prompt)
            p, q = logp.exp(), logq.exp()
            m = ((p + q) / 2).log()
            kinds = {
                "forward_kl": (p * (logp - logq)).sum(), "reverse_kl": (q * (logq - logp)).sum(),
                "jsd": ((p * (logp - m)).sum() + (q * (logq - m)).sum()) / 2,
            }  # fmt: skip
            total, count = total + kinds[kind], count + len(rows)
    (total / count).backward()
    return float(total.detach() / count), {name: p.grad for name, p in student.named_parameters()}


def ours(student, groups, teacher, kind, tokens_per_batch=10**6):
    """(loss, gradients by our names) of one step of training, the update left out."""
    optimizer = AdamW(student)
    optimizer.step = lambda lr, world: torch.zeros(())
    loss = divergence_loss(teacher.requires_grad_(False), kind)
    result = train_step(student, groups, loss, count_trained(groups), optimizer, 0.0, tokens_per_batch, ALONE)
    return result.loss, {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [False, True])
def test_loss_and_gradients_equal_the_dense_computation(tmp_path, kind, wide):
    """Issue 7: the kl target's loss and gradients against dense fp64; the teacher is as wide or wider. fp32 rounds to
    6e-8 and a gradient sums some hundred products through two layers: 2e-5 of the largest element is ample."""
    student = tiny_model(seed=3)
    teacher = tiny_model(seed=4, **({"width": 48, "num_layers": 3, "tied": False} if wide else {}))
    for model, name in ((student, "s"), (teacher, "t")):
        save_model(model, str(tmp_path / name))
    groups = make_groups()
    loss, grads = ours(student, groups, teacher, kind)
    exact, exact_grads = dense(tmp_path / "s", groups, tmp_path / "t", kind)
    assert loss == pytest.approx(exact, rel=1e-5) and exact > 0.01
    places = hf_names(student.config)
    assert places.keys() == exact_grads.keys() - {"lm_head.weight"}
    for name, place in places.items():
        mine, right = split(grads[place.parameter], place).double(), exact_grads[name]
        assert (mine - right).abs().max() <= 2e-5 * right.abs().max(), name
    assert all(p.grad is None for p in teacher.parameters())


def test_a_shifted_teacher_would_show(tmp_path):
    """The check above can fail: rows that are one off move the loss by far more than rounding."""
    student, teacher, groups = tiny_model(seed=3), tiny_model(seed=4), make_groups()
    right, _ = ours(student, groups, teacher, "forward_kl")
    shifted = [
        dataclasses.replace(
            g, teacher=dataclasses.replace(g.teacher, responses=g.responses[::-1], train=g.train[::-1])
        )
        for g in groups
    ]
    wrong, _ = ours(tiny_model(seed=3), shifted, teacher, "forward_kl")
    assert abs(wrong - right) > 1e-3 * right  # a hundred times what the check allows


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_rounding_only(kind):
    """One global denominator: any budget, one group or all in a micro-batch, the same loss and gradients."""
    groups, teacher = make_groups(9), tiny_model(seed=4)
    whole, expected = ours(tiny_model(seed=3), groups, teacher, kind)
    for budget in (1, 100):
        loss, grads = ours(tiny_model(seed=3), groups, teacher, kind, budget)
        assert loss == pytest.approx(whole, rel=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(
                grad, expected[name], atol=1e-5 * float(expected[name].abs().max()), rtol=1e-4
            )


def test_only_wanted_rows_meet_a_head(monkeypatch):
    """Issue 7: no (tokens x vocabulary) tensor, and both heads see the trained rows alone; a prompt is computed once
    for its responses by both models."""
    groups, seen, real = make_groups(4, k=3), [], ops.distill_loss

    def spy(student, weight, other, other_weight, kind):
        seen.append((len(student), len(other)))
        return real(student, weight, other, other_weight, kind)

    monkeypatch.setattr(ops, "distill_loss", spy)
    student, teacher = (tiny_model(seed=seed, vocab_size=5000) for seed in (3, 4))
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.numel()) or t, lambda t: t):
        loss = divergence_loss(teacher.requires_grad_(False), "forward_kl")
        batch = pack(groups)
        loss(student, batch, count_trained(groups)).backward()
    trained = count_trained(groups)
    assert seen == [(trained, trained)] and trained < batch.targets.numel()
    assert max(largest) < trained * student.config.vocab_size
    tokens = pack([g.teacher for g in groups]).tokens_computed
    assert tokens == sum(len(g.teacher.prompt) + sum(map(len, g.responses)) for g in groups)


def test_equal_readers_have_nothing_to_learn():
    """The same weights and prompts: zero loss and, to rounding, zero gradient; an empty micro-batch gives 0."""
    model, teacher = tiny_model(seed=3), tiny_model(seed=3)
    groups = [
        dataclasses.replace(g, teacher=PromptGroup(g.prompt, g.responses, g.train)) for g in make_groups()
    ]
    loss, grads = ours(model, groups, teacher, "forward_kl")
    assert abs(loss) < 1e-6 and max(float(g.abs().max()) for g in grads.values()) < 1e-5
    empty = divergence_loss(teacher, "jsd")(model, pack([]), 3)
    empty.backward()
    assert empty.item() == 0


def test_groups_of_a_prompt():
    """Both readers get the same response tokens; an answer that was cut does not train its end of turn."""
    tokenizer = Tokenizer(tiny_tokenizer(), {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    rows = [{"response": "yes", "finish": "stop"}, {"response": "n", "finish": "length"}]
    group = distill_group(tokenizer, "a cake?", "be wise\n\na cake?", rows)
    end = tokenizer.end_of_turn_id
    assert (
        group.responses
        == group.teacher.responses
        == [[*tokenizer.encode_plain("yes"), end], [*tokenizer.encode_plain("n"), end]]
    )
    assert group.train == group.teacher.train == [[True] * 4, [True, False]]
    assert len(group.teacher.prompt) - len(group.prompt) == len("be wise\n\n")


def test_the_text_target_trains_the_sample_alone():
    """CD-4, SFT-1: the mask is 1 on every token of the sample and 0 on the dialogue before it, its answers included."""
    tokenizer = Tokenizer(tiny_tokenizer(), {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bad"},
        {"role": "user", "content": "b"},
    ]
    group = encode(tokenizer, {"prompt": chat, "response": "yes"}, "last")
    end = tokenizer.end_of_turn_id
    trained = [token for token, flag in zip(group.responses[0], group.train[0], strict=True) if flag]
    assert trained == [*tokenizer.encode_plain("yes"), end] == group.responses[0][-4:]
    batch = pack([group])
    assert batch.num_trained == 4 and not batch.train_mask[:-4].any()


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_computes_the_same(kind):
    """A bf16 run's student and teacher: the loss within bf16's 8 bits of fp32's, gradients of its direction."""
    groups = make_groups()
    exact, grads = ours(tiny_model(seed=3), groups, tiny_model(seed=4), kind)
    student, teacher = tiny_model(seed=3), tiny_model(seed=4, dtype=torch.bfloat16).requires_grad_(False)
    optimizer = AdamW(student, torch.bfloat16)
    optimizer.step = lambda lr, world: torch.zeros(())
    loss = divergence_loss(teacher, kind)
    found = train_step(student, groups, loss, count_trained(groups), optimizer, 0.0, 10**6, ALONE)
    assert found.loss == pytest.approx(exact, rel=2e-2)
    for name, grad in zip(optimizer.names, optimizer.main_grads, strict=True):
        assert torch.nn.functional.cosine_similarity(grad.flatten(), grads[name].flatten(), 0) > 0.99, name
