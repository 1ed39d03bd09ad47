"""From raw pairs to token ids: the chat template, and the boundary between prompt and response.

The rule is TRL's: prompt, prompt+chosen and prompt+rejected are tokenized, and the longest token prefix that all three
have in common is the prompt; what follows it in each of the last two is scored. Plain text gets one end token at the
end of each response unless it ends with it already. Two places differ on purpose, and say so: a doubled leading BOS is
reduced to one, and a pair with nothing before or nothing after the boundary is refused or dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megadpo.data.dataset import Message, RawPair
from megadpo.errors import ConfigError, DataError
from megadpo.rank_logging import get_logger

logger = get_logger(__name__)

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPair:
    """One preference as token ids: the shared prompt [P], and the scored tokens of the responses, [C] and [R]."""

    index: int
    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds
    where: str = ""
    """FILE:LINE for messages; empty for pairs that come from no file"""


@dataclass(frozen=True, slots=True)
class TokenizationCounts:
    """What became of the pairs: read = kept + dropped_long_prompt + dropped_empty_response."""

    read: int
    kept: int
    truncated_chosen: int
    truncated_rejected: int
    dropped_long_prompt: int
    """the prompt alone reaches max_length"""
    dropped_empty_response: int
    """nothing of a response follows the boundary"""
    boundary_merged: int
    """of all read: the responses start before the end of the rendered prompt"""
    double_bos: int
    """of all read: a leading second BOS was removed"""


@dataclass(frozen=True, slots=True)
class TokenizedSet:
    """The retained pairs in the order of the data, and the counts of what was done to it."""

    pairs: list[TokenizedPair]
    counts: TokenizationCounts


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local Hugging Face directory, with a pad token (the end token where it has none).

    Raises ConfigError where there is no tokenizer, or it has no end token.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ConfigError(f"tokenizer directory {str(directory)!r} does not exist; it must hold the model's tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{directory} holds no tokenizer that can be loaded (tokenizer.json and tokenizer_config.json are needed): "
            f"{error}"
        ) from error
    if len(tokenizer) == 0:
        raise ConfigError(f"the tokenizer in {directory} has no vocabulary; copy the model's tokenizer.json there")
    if tokenizer.eos_token is None:
        raise ConfigError(f"the tokenizer in {directory} has no end token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("%s: no pad token; the end token %r serves as one", directory, tokenizer.eos_token)
    return cast(PreTrainedTokenizerBase, tokenizer)


def tokenize_pair(pair: RawPair, tokenizer: PreTrainedTokenizerBase) -> TokenizedPair:
    """The pair's token ids, not truncated; a response may have no tokens. Raises DataError at the pair's FILE:LINE."""
    return _split(pair, _encode(pair, tokenizer))


def truncate_keep_start(pair: TokenizedPair, max_length: int) -> TokenizedPair | None:
    """The pair with prompt+chosen and prompt+rejected each cut at `max_length`, None where the prompt reaches it."""
    room = max_length - len(pair.prompt)
    if room <= 0:
        return None
    if max(len(pair.chosen), len(pair.rejected)) <= room:
        return pair
    return replace(pair, chosen=pair.chosen[:room], rejected=pair.rejected[:room])


_TRUNCATIONS = {"keep_start": truncate_keep_start}


def tokenize_pairs(
    pairs: Sequence[RawPair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: str = "keep_start",
    name: str = "preference",
    progress: bool = False,
) -> TokenizedSet:
    """Tokenizes and truncates the pairs; logs what was cut, dropped and moved, and with `progress` every tenth.

    `name` says in messages which set of pairs this is.

    Raises DataError where a pair cannot be tokenized, and where no pair is left.
    """
    if max_length < 2:
        raise ConfigError(f"data.max_length={max_length}: at least 2 tokens, one of the prompt and one of a response")
    truncate = _TRUNCATIONS[truncation]
    kept: list[TokenizedPair] = []
    truncated_chosen = truncated_rejected = long_prompt = empty_response = merged = double_bos = 0
    for done, raw in enumerate(pairs, 1):
        encoded = _encode(raw, tokenizer)
        pair = _split(raw, encoded)
        double_bos += encoded.double_bos
        if len(pair.prompt) < len(encoded.prompt):
            if merged == 0:
                _warn_boundary(pair, encoded, tokenizer)
            merged += 1
        cut = truncate(pair, max_length)
        if cut is None:
            long_prompt += 1
        elif not len(cut.chosen) or not len(cut.rejected):
            empty_response += 1
        else:
            truncated_chosen += len(cut.chosen) < len(pair.chosen)
            truncated_rejected += len(cut.rejected) < len(pair.rejected)
            kept.append(cut)
        if progress and done * 10 // len(pairs) > (done - 1) * 10 // len(pairs):
            logger.info("tokenized %d of %d %s pairs", done, len(pairs), name)
    counts = TokenizationCounts(
        read=len(pairs),
        kept=len(kept),
        truncated_chosen=truncated_chosen,
        truncated_rejected=truncated_rejected,
        dropped_long_prompt=long_prompt,
        dropped_empty_response=empty_response,
        boundary_merged=merged,
        double_bos=double_bos,
    )
    _log_counts(counts, max_length, name)
    if not kept:
        raise DataError(
            f"none of the {len(pairs)} {name} pairs is left: the prompt alone reaches data.max_length={max_length} in "
            f"{counts.dropped_long_prompt}, and nothing of a response is left in {counts.dropped_empty_response}; "
            "raise data.max_length, or look at the data"
        )
    return TokenizedSet(kept, counts)


def describe_pair(pair: TokenizedPair, tokenizer: PreTrainedTokenizerBase) -> str:
    """The pair as text for the eye: token counts, then each sequence decoded with its scored part between ⟦ and ⟧."""
    where = f" ({pair.where})" if pair.where else ""
    lines = [f"pair {pair.index}{where}: prompt {len(pair.prompt)} tokens; scored tokens stand between ⟦ and ⟧"]
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        prompt_text, response_text = _decode_split(pair.prompt, response, tokenizer)
        lines += [f"--- {name}: {len(response)} tokens scored", f"{prompt_text}⟦{response_text}⟧"]
    return "\n".join(lines)


def check_vocabulary(pairs: Sequence[TokenizedPair], vocab_size: int) -> None:
    """Raises DataError at the first pair with a token id that the model's vocabulary of `vocab_size` does not have."""
    for pair in pairs:
        largest = max(int(ids.max(initial=-1)) for ids in (pair.prompt, pair.chosen, pair.rejected))
        if largest >= vocab_size:
            raise DataError(
                f"{pair.where + ': ' if pair.where else ''}pair {pair.index} has token id {largest}, the model's "
                f"vocabulary has {vocab_size} entries: the tokenizer belongs to another model, or tokens were added "
                "to it without resizing the embeddings"
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Encoded:
    """The three sequences as the tokenizer gives them, with one BOS at most at the start."""

    prompt: TokenIds
    prompt_chosen: TokenIds
    prompt_rejected: TokenIds
    double_bos: bool


def _encode(pair: RawPair, tokenizer: PreTrainedTokenizerBase) -> _Encoded:
    if isinstance(pair.prompt, str) and isinstance(pair.chosen, str) and isinstance(pair.rejected, str):
        sequences = _encode_text(pair.where, pair.prompt, pair.chosen, pair.rejected, tokenizer)
    elif isinstance(pair.prompt, list) and isinstance(pair.chosen, list) and isinstance(pair.rejected, list):
        sequences = _encode_chat(pair.where, pair.prompt, pair.chosen, pair.rejected, tokenizer)
    else:
        raise DataError(f"{pair.where}: prompt, chosen and rejected are all strings or all lists of messages")
    single = [_single_bos(ids, tokenizer.bos_token_id) for ids in sequences]
    double_bos = any(len(after) < len(before) for after, before in zip(single, sequences, strict=True))
    prompt, prompt_chosen, prompt_rejected = (np.asarray(ids, dtype=np.int32) for ids in single)
    return _Encoded(prompt, prompt_chosen, prompt_rejected, double_bos)


def _encode_text(
    where: str, prompt: str, chosen: str, rejected: str, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    eos = str(tokenizer.eos_token)
    texts = [prompt] + [prompt + (text if text.endswith(eos) else text + eos) for text in (chosen, rejected)]
    sequences = [cast(list[int], tokenizer(text)["input_ids"]) for text in texts]
    if sequences[0] and sequences[0][-1] == tokenizer.eos_token_id and not prompt.endswith(eos):
        raise DataError(
            f"{where}: the tokenizer ends every text with {eos!r} by itself, so that the prompt would end before the "
            "response; set add_eos_token to false in tokenizer_config.json"
        )
    return sequences


def _encode_chat(
    where: str,
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: conversational data, but the tokenizer has no chat template; add chat_template.jinja to the "
            "model's directory, or give prompt, chosen and rejected as plain text"
        )
    try:
        return [
            _render(prompt, tokenizer, add_generation_prompt=True),
            _render(prompt + chosen, tokenizer, add_generation_prompt=False),
            _render(prompt + rejected, tokenizer, add_generation_prompt=False),
        ]
    except (TemplateError, ValueError) as error:
        raise DataError(f"{where}: the chat template refuses the conversation: {error}") from error


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> list[int]:
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    return cast(list[int], ids)


def _single_bos(ids: list[int], bos_token_id: int | None) -> list[int]:
    start = 0
    while bos_token_id is not None and ids[start : start + 2] == [bos_token_id, bos_token_id]:
        start += 1
    return ids[start:]


def _split(pair: RawPair, encoded: _Encoded) -> TokenizedPair:
    boundary = min(
        _common_prefix_length(encoded.prompt, encoded.prompt_chosen),
        _common_prefix_length(encoded.prompt, encoded.prompt_rejected),
    )
    if boundary == 0:
        raise DataError(
            f"{pair.where}: the tokenized prompt and the tokenized prompt with a response have no first token in "
            "common, so nothing would predict the response's first token; end the prompt on a token boundary"
        )
    return TokenizedPair(
        index=pair.index,
        prompt=encoded.prompt[:boundary],
        chosen=encoded.prompt_chosen[boundary:],
        rejected=encoded.prompt_rejected[boundary:],
        where=pair.where,
    )


def _common_prefix_length(a: TokenIds, b: TokenIds) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if differs.size else length


def _decode_split(prompt: TokenIds, response: TokenIds, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and response as text; decoded together where possible, since some decoders strip a leading space."""

    def decode(ids: TokenIds) -> str:
        return cast(str, tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before, whole = decode(prompt), decode(np.concatenate([prompt, response]))
    return before, whole[len(before) :] if whole.startswith(before) else decode(response)


def _warn_boundary(pair: TokenizedPair, encoded: _Encoded, tokenizer: PreTrainedTokenizerBase) -> None:
    left_out = tokenizer.decode(encoded.prompt[len(pair.prompt) :].tolist())
    logger.warning(
        "%s: the tokenized prompt is not a prefix of the tokenized prompt with its responses (tokens merge across the "
        "boundary, or the chat template renders the prompt alone differently): the responses start where they part, "
        "before %r; such pairs are counted",
        pair.where,
        left_out,
    )


def _log_counts(counts: TokenizationCounts, max_length: int, name: str) -> None:
    logger.info("%s pairs: %d read, %d kept at max_length %d", name, counts.read, counts.kept, max_length)
    told = {
        "responses cut at max_length: chosen": counts.truncated_chosen,
        "responses cut at max_length: rejected": counts.truncated_rejected,
        "pairs dropped, the prompt alone reaches max_length": counts.dropped_long_prompt,
        "pairs dropped, nothing of a response is left to score": counts.dropped_empty_response,
        "pairs whose responses start before the end of the prompt": counts.boundary_merged,
        "pairs with a second BOS at the start, removed": counts.double_bos,
    }
    for what, number in told.items():
        if number:
            logger.warning("%s pairs: %s: %d of %d", name, what, number, counts.read)
