"""Log-probabilities of answers through packed prompt groups, against one plain pass per answer.

Mutation this file must catch: an answer that sees its neighbour, or sums that stand under another item."""

import pytest
import torch

from hpsafety.data.groups import PromptGroup, pack
from hpsafety.data.records import iter_json_lines, write_records
from hpsafety.errors import InputError
from hpsafety.model.io import load_model
from hpsafety.safety import multiple_choice
from hpsafety.safety.continuation import first_line, line_breaks
from hpsafety.safety.multiple_choice import ChoiceSettings, answer_file, choice_logprobs, encode_choices
from hpsafety.train import stage
from tests.stages.conftest import model_dir
from tests.tiny import random_groups, tiny_model

__all__ = ["model_dir"]  # a fixture


def alone(model, prompt: list[int], response: list[int]) -> float:
    """The plain way: the whole text through the model, a softmax over its logits, the answer's tokens summed."""
    batch = pack([PromptGroup(prompt, [response])])
    logits = model(batch).double() @ model.head_weight.double().T
    logs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(logs.gather(1, torch.tensor(response)[:, None]).sum())


def test_packed_groups_equal_one_pass_each():
    model, groups = tiny_model(), random_groups(9, k=5, seed=3) + random_groups(4, k=1, seed=4)
    found = choice_logprobs(model, groups, tokens_per_batch=150)
    assert [len(row) for row in found] == [len(g.responses) for g in groups]
    with torch.no_grad():
        expected = [[alone(model, g.prompt, r) for r in g.responses] for g in groups]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)
    assert choice_logprobs(model, groups, 10_000) == [pytest.approx(row, abs=2e-4) for row in found]
    assert choice_logprobs(model, [], 100) == []


class Merging:
    """A tokenizer whose tokens cross the context's end: "ab" is one token. bos is 9."""

    bos_id, eos_id = 9, 8

    def encode_plain(self, text):
        out = []
        while text:
            pair = text[:2] == "ab"
            out.append(7 if pair else " abc".index(text[0]))
            text = text[2 if pair else 1 :]
        return out

    def encode_text(self, text):
        return [9, *self.encode_plain(text)]


def test_answers_are_split_as_the_harness_does():
    """The answer is what the whole has beyond the context's own tokens; white space at the context's end is its own."""
    tokenizer = Merging()
    group = encode_choices(tokenizer, "c", [" a", "b"])
    assert (group.prompt, group.responses) == ([9, 3], [[0, 1], [2]])
    assert encode_choices(tokenizer, "c ", ["b"]).responses == [[0, 2]]
    assert encode_choices(tokenizer, "ca", ["bc"]).responses == [[3]]  # "cabc" is bos c ab c
    without = encode_choices(tokenizer, "", ["ab", "c"])
    assert (without.prompt, without.responses) == ([9], [[7], [3]])
    with pytest.raises(InputError, match="no token of its own"):
        encode_choices(tokenizer, "ca", ["b"])
    tokenizer.bos_id = None
    assert encode_choices(tokenizer, "", ["c"]).prompt == [8]


def test_bos_is_put_where_the_tokenizer_puts_it(model_dir):
    """A tokenizer of a bos of its own begins a text with it, as transformers and the harness do; others do not."""
    from tokenizers.processors import TemplateProcessing

    from hpsafety.model.tokenizer import Tokenizer
    from tests.stages.conftest import tiny_tokenizer

    plain = load_model(model_dir).tokenizer
    assert plain.encode_text("abc") == plain.encode_plain("abc")
    backend = tiny_tokenizer()
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    own = Tokenizer(backend, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    assert own.encode_text("abc") == [0, *plain.encode_plain("abc")]
    assert own.encode_text("<|im_end|>")[1:] == plain.encode_plain(
        "<|im_end|>"
    )  # text from outside stays text


def test_lines(model_dir):
    tokenizer = load_model(model_dir).tokenizer
    assert line_breaks(tokenizer) == {tokenizer.encode_plain("\n")[0]}
    assert first_line("  one\ntwo") == "one" and first_line("\nx") == "" and first_line(" a ") == "a"


def test_no_item_falls_between_two_windows(model_dir, tmp_path, monkeypatch):
    """The job's lines are those of any size of its window."""
    rows = [{"id": str(i), "text": f"a{i}", "choices": ["b", "cc"]} for i in range(7)]
    write_records(tmp_path / "items.jsonl", rows)
    found = {}
    for size in (256, 2, 3):
        monkeypatch.setattr(multiple_choice, "WINDOW", size)
        out = tmp_path / f"{size}.jsonl"
        settings = ChoiceSettings(
            model=model_dir, out=str(out), precision="fp32", tokens_per_batch=64, resume=True
        )
        with stage.ranks("cpu") as world:
            answer_file(settings, str(tmp_path / "items.jsonl"), world, "choices")
        found[size] = [row for _, row in iter_json_lines(out)]
        assert [row["id"] for row in found[size]] == [str(i) for i in range(7)]
    logs = [[row["logprobs"] for row in found[size]] for size in (256, 2, 3)]
    for other in logs[1:]:
        assert logs[0] == [pytest.approx(row, abs=1e-4) for row in other]
