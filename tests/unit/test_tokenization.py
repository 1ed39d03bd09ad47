"""The boundary between prompt and response, truncation and its counts, against hand-counted tokens and against TRL."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megadpo.data.dataset import RawPair, read_pairs
from megadpo.data.tokenization import (
    TokenIds,
    TokenizedPair,
    check_vocabulary,
    describe_pair,
    load_tokenizer,
    tokenize_pair,
    tokenize_pairs,
    truncate_keep_start,
)
from megadpo.errors import ConfigError, DataError
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


def of_lengths(prompt: int, chosen: int, rejected: int) -> TokenizedPair:
    prompt_ids, chosen_ids, rejected_ids = (np.arange(size, dtype=np.int32) for size in (prompt, chosen, rejected))
    return TokenizedPair(7, prompt_ids, chosen_ids, rejected_ids, where="data.jsonl:8")


# ------------------------------------------------------------------------------------------------------------ boundary
def test_plain_text_has_one_bos_and_one_end_token_in_each_response() -> None:
    tokenizer = byte_tokenizer()
    pair = tokenize_pair(plain("ab", "cd", "e</s>"), tokenizer)
    assert tokens(tokenizer, pair.prompt) == ["<s>", "a", "b"]
    assert tokens(tokenizer, pair.chosen) == ["c", "d", "</s>"]
    assert tokens(tokenizer, pair.rejected) == ["e", "</s>"]  # the end token in the text is not doubled
    assert {ids.dtype for ids in (pair.prompt, pair.chosen, pair.rejected)} == {np.dtype(np.int32)}
    assert (pair.index, pair.where) == (0, "data.jsonl:1")


def test_chatml_scores_the_end_token_and_the_newline_after_it_but_not_the_assistant_header() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML_TEMPLATE)
    pair = tokenize_pair(chat("hi", "yo", "no", system="s"), tokenizer)
    assert text(tokenizer, pair.prompt) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(tokenizer, pair.chosen) == "yo<|im_end|>\n"
    assert text(tokenizer, pair.rejected) == "no<|im_end|>\n"


def test_responses_that_begin_alike_do_not_extend_the_prompt() -> None:
    tokenizer = byte_tokenizer(chat_template=BOS_TEMPLATE)
    pair = tokenize_pair(chat("q", "same then", "same now"), tokenizer)
    assert tokens(tokenizer, pair.prompt) == ["<s>", "<|user|>", "q", "<|end|>", "<|assistant|>"]
    assert text(tokenizer, pair.chosen) == "same then<|end|>"


def test_a_template_that_renders_bos_gets_no_second_one() -> None:
    tokenizer = byte_tokenizer(chat_template=BOS_TEMPLATE)
    result = tokenize_pairs([chat("q", "a", "b")], tokenizer, max_length=64)
    assert tokens(tokenizer, result.pairs[0].prompt)[:2] == ["<s>", "<|user|>"]
    assert result.counts.double_bos == 0


def test_bos_in_the_text_of_a_tokenizer_that_adds_it_is_reduced_to_one_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = byte_tokenizer()
    result = tokenize_pairs([plain("<s>ab", "c", "d"), plain("ab", "c", "d", 1)], tokenizer, max_length=64)
    first, second = result.pairs
    assert first.prompt.tolist() == second.prompt.tolist()
    assert first.chosen.tolist() == second.chosen.tolist()
    assert result.counts.double_bos == 1
    assert "second BOS" in caplog.text


def test_a_merge_across_the_boundary_moves_it_for_both_responses_and_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = byte_tokenizer(merges=[("a", "b")])
    pairs = [plain("xa", "b!", "c"), plain("x", "b", "c", 1)]
    result = tokenize_pairs(pairs, tokenizer, max_length=64)
    assert tokens(tokenizer, result.pairs[0].prompt) == ["<s>", "x"]
    assert tokens(tokenizer, result.pairs[0].chosen) == ["ab", "!", "</s>"]
    assert tokens(tokenizer, result.pairs[0].rejected) == ["a", "c", "</s>"]
    assert result.counts.boundary_merged == 1
    assert "data.jsonl:1" in caplog.text and "before 'a'" in caplog.text


def test_a_template_that_renders_the_prompt_alone_differently_moves_the_boundary() -> None:
    tokenizer = byte_tokenizer(chat_template=THINKING_TEMPLATE)
    result = tokenize_pairs([chat("q", "a", "b")], tokenizer, max_length=128)
    assert text(tokenizer, result.pairs[0].prompt).endswith("<|im_start|>assistant\n")
    assert text(tokenizer, result.pairs[0].chosen) == "a<|im_end|>\n"
    assert result.counts.boundary_merged == 1


def test_a_prompt_that_merges_away_entirely_is_an_error() -> None:
    tokenizer = byte_tokenizer(merges=[("a", "b")], plain_text="$A")
    with pytest.raises(DataError, match=r"^data\.jsonl:1: .*no first token in common"):
        tokenize_pair(plain("a", "b", "c"), tokenizer)


# ---------------------------------------------------------------------------------------------------------- truncation
@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(20, (5, 4, 9)), (14, (5, 4, 9)), (13, (5, 4, 8)), (8, (5, 3, 3)), (6, (5, 1, 1)), (5, None), (4, None)],
)
def test_keep_start_cuts_each_sequence_and_drops_a_prompt_that_reaches_the_limit(
    max_length: int, expected: tuple[int, int, int] | None
) -> None:
    cut = truncate_keep_start(of_lengths(5, 4, 9), max_length)
    if expected is None:
        assert cut is None
    else:
        assert cut is not None
        assert (len(cut.prompt), len(cut.chosen), len(cut.rejected)) == expected
        assert cut.chosen.tolist() == list(range(expected[1]))
        assert (cut.index, cut.where) == (7, "data.jsonl:8")


def test_counts_and_order_of_what_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    tokenizer = byte_tokenizer()
    pairs = [
        plain("pppp", "cc", "rr", 0),  # 5 + 3: fits exactly
        plain("pppp", "ccc", "rr", 1),  # chosen cut
        plain("ppppppp", "c", "r", 2),  # the prompt with its BOS is 8 long: dropped
        plain("pppppp", "cc", "rrr", 3),  # both cut to one token
    ]
    result = tokenize_pairs(pairs, tokenizer, max_length=8, progress=True)
    assert [pair.index for pair in result.pairs] == [0, 1, 3]
    counts = result.counts
    assert (counts.read, counts.kept, counts.dropped_long_prompt, counts.dropped_empty_response) == (4, 3, 1, 0)
    assert (counts.truncated_chosen, counts.truncated_rejected) == (2, 1)
    assert tokens(tokenizer, result.pairs[2].rejected) == ["r"]
    assert "preference pairs: 4 read, 3 kept at max_length 8" in caplog.text
    assert "the prompt alone reaches max_length: 1 of 4" in caplog.text
    assert "cut at max_length: chosen: 2 of 4" in caplog.text
    assert "tokenized 4 of 4 preference pairs" in caplog.text


def test_progress_is_told_every_tenth(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    pairs = [plain("p", "c", "r", i) for i in range(25)]
    tokenize_pairs(pairs, byte_tokenizer(), max_length=8, progress=True)
    told = [record.getMessage() for record in caplog.records if " of 25 preference pairs" in record.getMessage()]
    assert len(told) == 10 and told[-1] == "tokenized 25 of 25 preference pairs"
    caplog.clear()
    tokenize_pairs(pairs, byte_tokenizer(), max_length=8)
    assert " of 25 preference pairs" not in caplog.text


def test_a_response_without_tokens_after_the_boundary_is_dropped_and_counted() -> None:
    tokenizer = byte_tokenizer(chat_template=FORGETFUL_TEMPLATE)
    result = tokenize_pairs([chat("q", "skip", "b"), chat("q", "a", "b", 1)], tokenizer, max_length=16)
    assert [pair.index for pair in result.pairs] == [1]
    assert (result.counts.dropped_empty_response, result.counts.dropped_long_prompt) == (1, 0)


def test_nothing_left_is_an_error_that_says_why() -> None:
    with pytest.raises(
        DataError, match=r"none of the 1 preference pairs is left: .*max_length=3 in 1, .* raise data.max_length"
    ):
        tokenize_pairs([plain("ppp", "c", "r")], byte_tokenizer(), max_length=3)
    with pytest.raises(ConfigError, match=r"data\.max_length=1"):
        tokenize_pairs([plain("p", "c", "r")], byte_tokenizer(), max_length=1)


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


def test_token_ids_beyond_the_vocabulary_name_the_pair() -> None:
    pairs = [of_lengths(5, 4, 9), of_lengths(5, 12, 9)]
    check_vocabulary(pairs, 12)
    with pytest.raises(DataError, match=r"^data\.jsonl:8: pair 7 has token id 11, .* 11 entries"):
        check_vocabulary(pairs, 11)


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
    assert tokenize_pair(chat("q", "a", "b"), tokenizer).chosen.tolist() == expected.chosen.tolist()


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
    pair = tokenize_pair(chat("hé", "yes", "no"), tokenizer)
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
    raw = read_pairs(Path(directory) / "dpo_en_demo.json").pairs
    tokenizer = byte_tokenizer(chat_template=CHATML_TEMPLATE)
    result = tokenize_pairs(raw, tokenizer, max_length=100_000)
    assert (result.counts.read, result.counts.kept, result.counts.boundary_merged) == (300, 300, 0)
    for source, pair in zip(raw, result.pairs, strict=True):
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
    result = tokenize_pairs(raw, tokenizer, max_length=max_length)
    ours = [
        [
            (pair.prompt.tolist() + response.tolist(), [0] * len(pair.prompt) + [1] * len(response))
            for response in (pair.chosen, pair.rejected)
        ]
        for pair in result.pairs
    ]
    assert ours == expected
    assert result.counts.dropped_long_prompt == (max_length == 48) * sum(
        len(tokenize_pair(pair, tokenizer).prompt) >= 48 for pair in raw
    )
    if max_length == 48:
        assert 0 < result.counts.kept < len(raw)
