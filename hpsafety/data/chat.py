"""Chat: messages to text by the model's own template, and to tokens with exact train masks.

A tokenizer here is anything with `encode(text)` (special tokens in the text are recognised, nothing is
added), `encode_plain(text)` (never yields special tokens), `decode(ids, skip_special=True)`, `chat_template`,
`bos_token`, `eos_token` (text or None) and `end_of_turn_id`.

Text that people wrote must not be able to close a turn or open another: where a message holds the text of a
special token, that text is marked before rendering and encoded as plain text afterwards. A chat without such
text takes the plain path: up to the first answer it is encoded in one piece, as transformers does.
"""

import re
from typing import Literal

from hpsafety.data.groups import PromptGroup
from hpsafety.data.sandbox import run_template
from hpsafety.data.schemas import ROLES
from hpsafety.errors import InputError


def render(
    template: str,
    messages: list[dict],
    *,
    add_generation_prompt: bool,
    bos_token: str | None = "",
    eos_token: str | None = "",
) -> str:
    """The text a chat template makes of messages [{role, content}], equal to transformers' rendering.

    The template is untrusted: see `sandbox`. Raises InputError, in one line, for whatever goes wrong in it.
    """
    variables = {
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token or "",
        "eos_token": eos_token or "",
    }
    try:
        return run_template(template, variables)
    except Exception as error:  # a template may raise anything: it is a program from a file
        kind = (
            "" if type(error).__module__.startswith(("jinja2", "hpsafety")) else f"{type(error).__name__}: "
        )
        reason = "".join(c if c.isprintable() else " " for c in f"{kind}{error}")[:300]
        raise InputError(f"the model's chat template cannot be used: {' '.join(reason.split())}") from None


def prompt_messages(prompt: str | list[dict]) -> list[dict]:
    """Messages of a prompt, which is one user message when it is a string."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def encode_prompt(tokenizer, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt up to and with the generation prompt: what the model sees before it answers."""
    head, answers = _encode_turns(tokenizer, prompt_messages(prompt))
    return head + [token for answer, separator in answers for token in answer + separator]


def default_system(tokenizer) -> str:
    """The system text that the model's chat template writes where a chat has none; "" where it writes none.

    Raises InputError where the template leaves out the system message a chat has, so that none can be given.
    """
    user, probe = {"role": "user", "content": "A"}, "\N{LEFT CEILING}system\N{RIGHT CEILING}"
    _check_messages(tokenizer, [user])
    plain = _render_for(tokenizer, [user])
    given = _render_for(tokenizer, [{"role": "system", "content": probe}, user])
    before, found, after = given.partition(probe)
    if not found:
        raise InputError("the model's chat template takes no system message")
    fits = plain.startswith(before) and plain.endswith(after) and len(plain) >= len(before) + len(after)
    return plain[len(before) : len(plain) - len(after)] if fits else ""


def encode_response(tokenizer, text: str) -> list[int]:
    """Token ids of an answer: its text, in which nothing is special, and the end-of-turn token."""
    return [*(tokenizer.encode_plain(text) if text else []), tokenizer.end_of_turn_id]


def encode_dialogue(
    tokenizer, prompt: str | list[dict], response: str, train: Literal["all", "last"] = "all"
) -> PromptGroup:
    """One group of one response: the dialogue from the first answer on, with `train` true on answer tokens.

    The prompt is everything up to the first assistant turn's generation prompt. `train` is true on every
    answer and its end-of-turn token ("all"), or on the last answer's only ("last"), never on what stands
    between. What comes before the last answer equals `encode_prompt(tokenizer, prompt)`. The newline some
    templates write after the end of turn is not fed after the last answer.
    """
    head, answers = _encode_turns(tokenizer, prompt_messages(prompt))
    tokens: list[int] = []
    mask: list[bool] = []
    for answer, separator in answers:
        tokens += answer + separator
        mask += [train == "all"] * len(answer) + [False] * len(separator)
    last = encode_response(tokenizer, response)
    return PromptGroup(head, [tokens + last], [mask + [True] * len(last)] if answers else None)


def _encode_turns(tokenizer, messages: list[dict]) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """(tokens up to the first generation prompt, [(tokens of an answer, tokens up to the next), ...]).

    Raises InputError when the template rewrites an earlier turn once a later one is there.
    """
    _check_messages(tokenizer, messages)
    # Only role and content reach the template: other fields are not searched for special tokens.
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    messages, marks = _mark_specials(tokenizer, messages)
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    texts = [_render_for(tokenizer, messages[:end]) for end in [*ends, len(messages)]]
    end_of_turn = tokenizer.decode([tokenizer.end_of_turn_id], skip_special=False)
    answers = []
    for turn, (index, before, after) in enumerate(zip(ends, texts, texts[1:], strict=False), start=1):
        answer, separator = _split_turn(before, after, messages[index]["content"], end_of_turn, turn)
        answer_tokens = _encode_marked(tokenizer, answer, marks, plain=True) + [tokenizer.end_of_turn_id]
        answers.append((answer_tokens, _encode_marked(tokenizer, separator, marks)))
    return _encode_marked(tokenizer, texts[0], marks), answers


def _split_turn(before: str, after: str, content: str, end_of_turn: str, turn: int) -> tuple[str, str]:
    """(answer, text from its end of turn to the next generation prompt) of one assistant turn.

    before  text up to the turn's generation prompt; `after` goes on to the next one
    A template may trim the answer or put white space around it; it may not change what stood before.
    """
    rest = after[len(before) :]
    content = content.strip()
    start = rest.find(content)
    end = rest.find(end_of_turn, start + len(content))
    around = rest[:start] + rest[start + len(content) : end]
    if not after.startswith(before) or start < 0 or end < 0 or around.strip():
        raise InputError(
            f"the model's chat template writes assistant turn {turn} otherwise when more turns follow, so it "
            "cannot be trained as the model sees it; split the dialogue into rows of one answer each"
        )
    return rest[:end], rest[end + len(end_of_turn) :]


def _render_for(tokenizer, messages: list[dict]) -> str:
    return render(
        tokenizer.chat_template,
        messages,
        add_generation_prompt=True,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )


def _check_messages(tokenizer, messages: list[dict]) -> None:
    if tokenizer is None:
        raise InputError("the model has no tokenizer; add its tokenizer.json and tokenizer_config.json")
    if tokenizer.chat_template is None:
        where = "add chat_template to its tokenizer_config.json"
        raise InputError(f"the model has no chat template; {where} or use a chat model")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise InputError(f"a message needs a role ({', '.join(ROLES)}) and a content that is text")
    if not messages or messages[-1]["role"] != "user":
        raise InputError("a prompt must end with a user message")
    if messages[0]["role"] == "assistant":
        raise InputError("a prompt must not begin with an assistant message")


# ---- special tokens in what people wrote ----


def _mark_specials(tokenizer, messages: list[dict]) -> tuple[list[dict], tuple[str, str] | None]:
    """The messages, each special token's text in a content between two marks, and the marks, if needed."""
    contents = [message["content"] for message in messages]
    specials = set().union(*(_specials_in(tokenizer, content) for content in contents))
    if not specials:
        return messages, None
    unused = (
        chr(code) for code in range(0xF0000, 0xFFFFE) if not any(chr(code) in text for text in contents)
    )
    marks = next(unused), next(unused)
    pattern = re.compile("|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True)))
    marked = [pattern.sub(lambda found: marks[0] + found[0] + marks[1], content) for content in contents]
    return [{**m, "content": content} for m, content in zip(messages, marked, strict=True)], marks


def _specials_in(tokenizer, text: str) -> set[str]:
    """The texts of special tokens that `encode` would find in `text`."""
    tokens = tokenizer.encode(text)
    if tokens == tokenizer.encode_plain(text):
        return set()
    spelled = {tokenizer.decode([token], skip_special=False) for token in set(tokens)}
    return {s for s in spelled if s and s in text and tokenizer.encode(s) != tokenizer.encode_plain(s)}


def _encode_marked(tokenizer, text: str, marks: tuple[str, str] | None, plain: bool = False) -> list[int]:
    """Token ids of rendered text, what stands between marks as plain text; with `plain`, all of it."""
    encode = tokenizer.encode_plain if plain else tokenizer.encode
    if marks is None:
        return encode(text) if text else []
    if plain:
        return encode(text.translate({ord(mark): None for mark in marks}))
    tokens: list[int] = []
    opening, closing = marks
    for piece in re.split(f"({opening}[^{opening}{closing}]*{closing})", text):
        inside = piece.startswith(opening) and piece.endswith(closing)
        # A template may have cut a marked text in two; its parts stay apart, so that no others can join up.
        for part in re.split(f"[{opening}{closing}]", piece):
            if part:
                tokens += tokenizer.encode_plain(part) if inside else encode(part)
    return tokens
