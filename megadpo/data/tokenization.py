"""Tokenizes a pair: the chat template, and the boundary between prompt and response.

The rule is TRL's: prompt, prompt+chosen and prompt+rejected are tokenized, and the longest token prefix that all three
have in common is the prompt; the rest of the last two is scored. Plain text gets one end token at the end of each
response unless it ends with it already. Two deviations are on purpose, and reported: a doubled leading BOS is reduced
to one, and a pair with nothing before the boundary is refused. Templates that ask for the date get a fixed one.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import TypeAlias, cast
from unittest import mock

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils as templates

from megadpo.data.dataset import RawPair
from megadpo.data.messages import Message
from megadpo.errors import ConfigError, DataError, visible
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

TokenIds = npt.NDArray[np.int32]
Tokenizer: TypeAlias = PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPair:
    """One preference as token ids: the shared prompt [P], and the scored tokens of the responses, [C] and [R]."""

    index: int
    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds
    where: str = ""
    """FILE:LINE for messages; empty for pairs that come from no file"""

    @property
    def digest(self) -> bytes:
        """Hash of the three lists of token ids, 16 bytes; it does not depend on the pair's source."""
        digest = hashlib.blake2b(digest_size=16)
        for ids in (self.prompt, self.chosen, self.rejected):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids.astype("<i4", copy=False).tobytes())
        return digest.digest()


@dataclass(frozen=True, slots=True, eq=False)
class Tokenization:
    """A pair's untruncated token ids, and findings of tokenizing it; a response may have no tokens."""

    pair: TokenizedPair
    left_out: TokenIds
    """end of the tokenized prompt behind the boundary; the responses start before it, so it is scored with them"""
    double_bos: bool
    """a leading second BOS was removed"""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer of a local Hugging Face directory; if it has no pad token, that is the end token.

    Raises ConfigError if there is no tokenizer, or it has no end token.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ConfigError(f"tokenizer directory {str(directory)!r} does not exist; it must hold the model's tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files: tokenizers raises bare Exceptions, other libraries anything
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the tokenizer in {directory} needs a program of its own (auto_map in tokenizer_config.json), and "
                "programs of models are not run: save it as a tokenizer.json where you trust it, and give that"
            ) from error
        raise ConfigError(
            f"{directory} holds no tokenizer that can be loaded (tokenizer.json and tokenizer_config.json are needed; "
            f"copy the model's there): {type(error).__name__}: {error}"
        ) from error
    if len(tokenizer) == 0:
        raise ConfigError(f"the tokenizer in {directory} has no vocabulary; copy the model's tokenizer.json there")
    if tokenizer.eos_token is None:
        raise ConfigError(f"the tokenizer in {directory} has no end token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("%s: no pad token; the end token %r serves as one", directory, tokenizer.eos_token)
    return cast(Tokenizer, tokenizer)


def tokenize_pair(pair: RawPair, tokenizer: Tokenizer, *, template_date: date | None = None) -> Tokenization:
    """Tokenizes a pair. Raises DataError with the pair's FILE:LINE if the tokenizer or its template refuses it.

    `template_date` is the date for chat templates that ask for today's; None: the clock's.
    """
    if isinstance(pair.prompt, str) and isinstance(pair.chosen, str) and isinstance(pair.rejected, str):
        sequences = _encode_text(pair.where, pair.prompt, pair.chosen, pair.rejected, tokenizer)
    elif isinstance(pair.prompt, list) and isinstance(pair.chosen, list) and isinstance(pair.rejected, list):
        sequences = _encode_chat(pair, tokenizer, template_date)
    else:
        raise DataError(f"{pair.where}: prompt, chosen and rejected are all strings or all lists of messages")
    single = [_single_bos(ids, tokenizer.bos_token_id) for ids in sequences]
    prompt, prompt_chosen, prompt_rejected = (np.asarray(ids, dtype=np.int32) for ids in single)
    boundary = min(_common_prefix_length(prompt, prompt_chosen), _common_prefix_length(prompt, prompt_rejected))
    if boundary == 0:
        raise DataError(
            f"{pair.where}: the tokenized prompt and the tokenized prompt with a response have no first token in "
            "common, so nothing would predict the response's first token; end the prompt on a token boundary"
        )
    return Tokenization(
        pair=TokenizedPair(
            index=pair.index,
            prompt=prompt[:boundary],
            chosen=prompt_chosen[boundary:],
            rejected=prompt_rejected[boundary:],
            where=pair.where,
        ),
        left_out=prompt[boundary:],
        double_bos=any(len(after) < len(before) for after, before in zip(single, sequences, strict=True)),
    )


def describe_pair(pair: TokenizedPair, tokenizer: Tokenizer) -> str:
    """Describes a pair as text: token counts, then each sequence decoded with its scored part between ⟦ and ⟧."""
    where = f" ({pair.where})" if pair.where else ""
    lines = [f"pair {pair.index}{where}: prompt {len(pair.prompt)} tokens; scored tokens stand between ⟦ and ⟧"]
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        prompt_text, response_text = _decode_split(pair.prompt, response, tokenizer)
        lines += [f"--- {name}: {len(response)} tokens scored", visible(f"{prompt_text}⟦{response_text}⟧")]
    return "\n".join(lines)


def _encode_text(where: str, prompt: str, chosen: str, rejected: str, tokenizer: Tokenizer) -> list[list[int]]:
    eos = str(tokenizer.eos_token)
    texts = [prompt] + [prompt + (text if text.endswith(eos) else text + eos) for text in (chosen, rejected)]
    sequences = [cast(list[int], tokenizer(text)["input_ids"]) for text in texts]
    if sequences[0] and sequences[0][-1] == tokenizer.eos_token_id and not prompt.endswith(eos):
        raise DataError(
            f"{where}: the tokenizer ends every text with {eos!r} by itself, so that the prompt would end before the "
            "response; set add_eos_token to false in tokenizer_config.json"
        )
    return sequences


@dataclass(frozen=True, slots=True)
class _Clock:
    """Replaces the class `datetime` where transformers asks it for the time: it returns midnight of one day."""

    day: date

    def now(self) -> datetime:
        return datetime.combine(self.day, time())


def _encode_chat(pair: RawPair, tokenizer: Tokenizer, template_date: date | None) -> list[list[int]]:
    if not tokenizer.chat_template:
        raise DataError(
            f"{pair.where}: conversational data, but the tokenizer has no chat template; add chat_template.jinja to "
            "the model's directory, or give prompt, chosen and rejected as plain text"
        )
    arguments = {"tools": pair.tools, **(pair.template_kwargs or {})}

    def render(messages: list[Message], *, add_generation_prompt: bool) -> list[int]:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False, **arguments
        )
        return cast(list[int], ids)

    prompt = cast(list[Message], pair.prompt)
    # Templates ask transformers for the date, which only takes it from the clock.
    clock = nullcontext() if template_date is None else mock.patch.object(templates, "datetime", _Clock(template_date))
    try:
        with clock:
            return [
                render(prompt, add_generation_prompt=True),
                render(prompt + cast(list[Message], pair.chosen), add_generation_prompt=False),
                render(prompt + cast(list[Message], pair.rejected), add_generation_prompt=False),
            ]
    except Exception as error:  # a template is a program: it may refuse the pair, divide by zero, look up a missing key
        reason = str(error) or type(error).__name__
        raise DataError(f"{pair.where}: the chat template refuses the conversation: {reason}") from error


def _single_bos(ids: list[int], bos_token_id: int | None) -> list[int]:
    start = 0
    while bos_token_id is not None and ids[start : start + 2] == [bos_token_id, bos_token_id]:
        start += 1
    return ids[start:]


def _common_prefix_length(a: TokenIds, b: TokenIds) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if differs.size else length


def _decode_split(prompt: TokenIds, response: TokenIds, tokenizer: Tokenizer) -> tuple[str, str]:
    """Decodes prompt and response; together if possible, since some decoders strip a leading space."""

    def decode(ids: TokenIds) -> str:
        return cast(str, tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before, whole = decode(prompt), decode(np.concatenate([prompt, response]))
    return before, whole[len(before) :] if whole.startswith(before) else decode(response)
