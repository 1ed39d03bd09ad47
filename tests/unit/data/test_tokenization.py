"""The boundary between prompt and response, against hand-counted tokens and against TRL."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megadpo.data.dataset import RawPair
from megadpo.data.tokenization import (
    TokenIds,
    TokenizedPair,
    describe_pair,
    load_tokenizer,
    tokenize_pair,
)
from megadpo.data.truncation import Outcome, cut_to_length
from megadpo.errors import ConfigError, DataError
from tests.helpers.pairs import read_pairs
from tests.helpers.tokenizers import BOS_TEMPLATE, CHATML_TEMPLATE, byte_tokenizer

THINKING_TEMPLATE = CHATML_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>' }}")
RAISING_TEMPLATE = "{{ raise_exception('roles must alternate') }}"
FORGETFUL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['content'] != 'skip' %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def plain(prompt: str, chosen: str, rejected: str, index: int = 0) -> RawPair:
    return RawPair(index, f"data.jsonl:{index + 1}", prompt, chosen, rejected)


def chat(prompt: str, chosen: str, rejected: str, index: int = 0, system: str | None = None) -> RawPair:
    first = [] if system is None else [{"role": "system", "content": system}]
    return RawPair(
        index,
        f"data.jsonl:{index + 1}",
        [*first, {"role": "user", "content": prompt}],
        [{"role": "assistant", "content": chosen}],
        [{"role": "assistant", "content": rejected}],
    )


def tokens(tokenizer: PreTrainedTokenizerFast, ids: TokenIds) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())]


def text(tokenizer: PreTrainedTokenizerFast, ids: TokenIds) -> str:
    return str(tokenizer.decode(ids.tolist()))


# ------------------------------------------------------------------------------------------------------------ boundary
def test_plain_text_has_one_bos_and_one_end_token_in_each_response() -> None:
    tokenizer = byte_tokenizer()
    pair = tokenize_pair(plain("ab", "cd", "e</s>"), tokenizer).pair
    assert tokens(tokenizer, pair.prompt) == ["<s>", "a", "b"]
    assert tokens(tokenizer, pair.chosen) == ["c", "d", "</s>"]
    assert tokens(tokenizer, pair.rejected) == ["e", "</s>"]  # the end token in the text is not doubled
    assert {ids.dtype for ids in (pair.prompt, pair.chosen, pair.rejected)} == {np.dtype(np.int32)}
    assert (pair.index, pair.where) == (0, "data.jsonl:1")


def test_chatml_scores_the_end_token_and_the_newline_after_it_but_not_the_assistant_header() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML_TEMPLATE)
    pair = tokenize_pair(chat("hi", "yo", "no", system="s"), tokenizer).pair
    assert text(tokenizer, pair.prompt) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(tokenizer, pair.chosen) == "yo<|im_end|>\n"
    assert text(tokenizer, pair.rejected) == "no<|im_end|>\n"


def test_responses_that_begin_alike_do_not_extend_the_prompt() -> None:
    tokenizer = byte_tokenizer(chat_template=BOS_TEMPLATE)
    pair = tokenize_pair(chat("q", "same then", "same now"), tokenizer).pair
    assert tokens(tokenizer, pair.prompt) == ["<s>", "<|user|>", "q", "<|end|>", "<|assistant|>"]
    assert text(tokenizer, pair.chosen) == "same then<|end|>"


def test_a_template_that_renders_bos_gets_no_second_one() -> None:
    tokenizer = byte_tokenizer(chat_template=BOS_TEMPLATE)
    result = tokenize_pair(chat("q", "a", "b"), tokenizer)
    assert tokens(tokenizer, result.pair.prompt)[:2] == ["<s>", "<|user|>"]
    assert not result.double_bos


def test_bos_in_the_text_of_a_tokenizer_that_adds_it_is_reduced_to_one_and_told() -> None:
    tokenizer = byte_tokenizer()
    doubled, single = (tokenize_pair(plain(prompt, "c", "d"), tokenizer) for prompt in ("<s>ab", "ab"))
    assert doubled.pair.prompt.tolist() == single.pair.prompt.tolist()
    assert doubled.pair.chosen.tolist() == single.pair.chosen.tolist()
    assert (doubled.double_bos, single.double_bos) == (True, False)


def test_a_merge_across_the_boundary_moves_it_for_both_responses_and_is_told() -> None:
    tokenizer = byte_tokenizer(merges=[("a", "b")])
    result = tokenize_pair(plain("xa", "b!", "c"), tokenizer)
    assert tokens(tokenizer, result.pair.prompt) == ["<s>", "x"]
    assert tokens(tokenizer, result.pair.chosen) == ["ab", "!", "</s>"]
    assert tokens(tokenizer, result.pair.rejected) == ["a", "c", "</s>"]
    assert tokens(tokenizer, result.left_out) == ["a"]
    assert not len(tokenize_pair(plain("x", "b", "c"), tokenizer).left_out)


def test_a_template_that_renders_the_prompt_alone_differently_moves_the_boundary() -> None:
    tokenizer = byte_tokenizer(chat_template=THINKING_TEMPLATE)
    result = tokenize_pair(chat("q", "a", "b"), tokenizer)
    assert text(tokenizer, result.pair.prompt).endswith("<|im_start|>assistant\n")
    assert text(tokenizer, result.pair.chosen) == "a<|im_end|>\n"
    assert text(tokenizer, result.left_out) == "<think>"


def test_a_response_may_have_no_tokens_after_the_boundary() -> None:
    tokenizer = byte_tokenizer(chat_template=FORGETFUL_TEMPLATE)
    assert tokenize_pair(chat("q", "skip", "b"), tokenizer).pair.chosen.tolist() == []


def test_a_template_is_told_the_given_date() -> None:
    tokenizer = byte_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }}" + CHATML_TEMPLATE)
    pair = tokenize_pair(chat("q", "a", "b"), tokenizer, template_date=date(2024, 7, 26)).pair
    assert text(tokenizer, pair.prompt).startswith("26 Jul 2024<|im_start|>user")
    today = tokenize_pair(chat("q", "a", "b"), tokenizer).pair
    assert not text(tokenizer, today.prompt).startswith("26 Jul 2024")


def test_tools_and_template_arguments_reach_the_template() -> None:
    template = "{{ mood }}{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}" + CHATML_TEMPLATE
    tokenizer = byte_tokenizer(chat_template=template)
    pair = replace(chat("q", "a", "b"), tools=[{"name": "search"}], template_kwargs={"mood": "glad"})
    assert text(tokenizer, tokenize_pair(pair, tokenizer).pair.prompt).startswith("glad[search]<|im_start|>")


def test_a_prompt_that_merges_away_entirely_is_an_error() -> None:
    tokenizer = byte_tokenizer(merges=[("a", "b")], plain_text="$A")
    with pytest.raises(DataError, match=r"^data\.jsonl:1: .*no first token in common"):
        tokenize_pair(plain("a", "b", "c"), tokenizer)


# -------------------------------------------------------------------------------------------------------------- errors
def test_conversation_without_a_chat_template_names_the_remedy() -> None:
    with pytest.raises(DataError, match=r"^data\.jsonl:3: .*chat_template\.jinja"):
        tokenize_pair(chat("q", "a", "b", 2), byte_tokenizer())


def test_a_template_that_refuses_the_conversation_names_the_row() -> None:
    with pytest.raises(DataError, match=r"^data\.jsonl:3: .*roles must alternate"):
        tokenize_pair(chat("q", "a", "b", 2), byte_tokenizer(chat_template=RAISING_TEMPLATE))


def test_a_tokenizer_that_ends_every_text_is_refused_for_plain_text() -> None:
    with pytest.raises(DataError, match=r"^data\.jsonl:1: .*add_eos_token"):
        tokenize_pair(plain("p", "c", "r"), byte_tokenizer(plain_text="<s> $A </s>"))


def test_text_mixed_with_messages_is_an_error() -> None:
    mixed = RawPair(0, "data.jsonl:1", "p", [{"role": "assistant", "content": "c"}], "r")
    with pytest.raises(DataError, match=r"^data\.jsonl:1: .*all strings or all lists"):
        tokenize_pair(mixed, byte_tokenizer())


# ---------------------------------------------------------------------------------------------------------- tokenizers
def test_load_tokenizer_falls_back_to_the_end_token_for_padding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    byte_tokenizer(pad_token=None, chat_template=CHATML_TEMPLATE).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert "no pad token" in caplog.text
    expected = tokenize_pair(chat("q", "a", "b"), byte_tokenizer(chat_template=CHATML_TEMPLATE))
    assert tokenize_pair(chat("q", "a", "b"), tokenizer).pair.chosen.tolist() == expected.pair.chosen.tolist()


def test_load_tokenizer_keeps_a_pad_token_that_exists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<pad>"
    assert "pad token" not in caplog.text


def test_load_tokenizer_refuses_what_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    byte_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no end token"):
        load_tokenizer(tmp_path)


def test_describe_pair_marks_what_is_scored() -> None:
    tokenizer = byte_tokenizer(chat_template=BOS_TEMPLATE)
    pair = tokenize_pair(chat("hé", "yes", "no"), tokenizer).pair
    assert describe_pair(pair, tokenizer) == (
        "pair 0 (data.jsonl:1): prompt 7 tokens; scored tokens stand between ⟦ and ⟧\n"
        "--- chosen: 4 tokens scored\n<s><|user|>hé<|end|><|assistant|>⟦yes<|end|>⟧\n"
        "--- rejected: 3 tokens scored\n<s><|user|>hé<|end|><|assistant|>⟦no<|end|>⟧"
    )


def test_describe_pair_shows_a_character_split_by_the_boundary() -> None:
    tokenizer = byte_tokenizer()
    prompt, response = np.array([1], dtype=np.int32), tokenizer("é", add_special_tokens=False)["input_ids"]
    second_byte = np.array(response[1:], dtype=np.int32)
    half = TokenizedPair(3, np.append(prompt, response[:1]).astype(np.int32), second_byte, second_byte)
    assert describe_pair(half, tokenizer).splitlines()[2] == "<s>\ufffd⟦\ufffd⟧"


# ----------------------------------------------------------------------------------------------------- real data, TRL
def test_real_conversations_decode_to_what_the_template_renders() -> None:
    directory = os.environ.get("MEGADPO_TEST_DATA")
    if not directory:
        pytest.skip("MEGADPO_TEST_DATA does not name a directory with dpo_en_demo.json")
    raw = read_pairs(Path(directory) / "dpo_en_demo.json")
    assert len(raw) == 300
    tokenizer = byte_tokenizer(chat_template=CHATML_TEMPLATE)
    for source in raw:
        result = tokenize_pair(source, tokenizer)
        pair = result.pair
        assert not len(result.left_out)
        assert isinstance(source.prompt, list) and isinstance(source.rejected, list)
        rendered = tokenizer.apply_chat_template(source.prompt + source.rejected, tokenize=False)
        assert text(tokenizer, np.concatenate([pair.prompt, pair.rejected])) == rendered
        assert text(tokenizer, pair.rejected) == source.rejected[0]["content"] + "<|im_end|>\n"


def trl_sequences(pairs: list[RawPair], tokenizer: Any, max_length: int) -> list[list[tuple[list[int], list[int]]]]:
    """(token ids, completion mask) of [chosen, rejected] of each pair that TRL's own trainer and collator keep."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    arguments: Any = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    dataset = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, arguments, "train")
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=max_length)(list(dataset))
    lengths = batch["attention_mask"].sum(1).tolist()
    sequences = [
        (ids[:length], mask[:length])
        for ids, mask, length in zip(
            batch["input_ids"].tolist(), batch["completion_mask"].tolist(), lengths, strict=True
        )
    ]
    half = len(sequences) // 2
    return [[sequences[i], sequences[half + i]] for i in range(half)]


TEXTS = [
    ("What is 2+2?", " 4.", " 5, I think."),
    ("xa", "b and more", "c"),  # a + b merge across the boundary
    ("ends by itself: ", "yes</s>", "no</s> "),
    ("a rather long prompt that reaches the limit of forty-eight", "x", "y"),  # dropped at 48
    ("Long answers follow", " and this one is cut at the limit", " no"),
    ("é", "naïve ✓", "\n"),
]


@pytest.mark.parametrize("max_length", [48, 4096])
@pytest.mark.parametrize(
    ("make", "template"),
    [(plain, None), (chat, BOS_TEMPLATE), (chat, CHATML_TEMPLATE), (chat, THINKING_TEMPLATE)],
    ids=["plain", "bos-template", "chatml", "thinking"],
)
def test_token_ids_and_masks_are_those_of_trl(make: Any, template: str | None, max_length: int) -> None:
    pytest.importorskip("trl", minversion="1.16", reason="TRL is the oracle of this test")
    tokenizer = byte_tokenizer(merges=[("a", "b"), ("n", "d")], chat_template=template)
    raw = [make(*texts, index) for index, texts in enumerate(TEXTS)]
    expected = trl_sequences(raw, tokenizer, max_length)
    pairs = [tokenize_pair(pair, tokenizer).pair for pair in raw]
    lengths = [
        np.array([len(part) for part in column], dtype=np.int32)
        for column in zip(*((pair.prompt, pair.chosen, pair.rejected) for pair in pairs), strict=True)
    ]
    cut = cut_to_length(*lengths, max_length=max_length, mode="keep_start")
    ours = [
        [
            (pair.prompt.tolist() + response[:room].tolist(), [0] * len(pair.prompt) + [1] * int(room))
            for response, room in ((pair.chosen, cut.chosen_n[i]), (pair.rejected, cut.rejected_n[i]))
        ]
        for i, pair in enumerate(pairs)
        if cut.outcome_n[i] == Outcome.KEPT
    ]
    assert ours == expected
    assert (len(ours) < len(raw)) == (max_length == 48)
