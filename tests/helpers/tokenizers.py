"""Small byte-level tokenizers, made in memory: one token for each byte, so that tests can count by hand."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = "<pad> <s> </s> <|user|> <|assistant|> <|system|> <|end|> <|im_start|> <|im_end|>".split()

BOS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What the templates of published models do beside joining messages; each of these does one thing of it.
DEFAULT_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe of help.<|im_end|>\n' }}{% endif %}"
) + CHATML_TEMPLATE
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
) + BOS_TEMPLATE
TRIMMING_TEMPLATE = BOS_TEMPLATE.replace("m['content']", "(m['content'] | trim)")
DATE_TEMPLATE = (
    "{{ bos_token + '<|system|>Today: ' + strftime_now('%d %b %Y') + '<|end|>' }}"
) + BOS_TEMPLATE.removeprefix("{{ bos_token }}")
# Shows the thoughts of the last answer only, as Qwen3 does; `enable_thinking=false` opens the answer with an empty one.
REWRITING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% elif m['role'] == 'assistant' and m['reasoning_content'] %}"
    "{{ '<think>\n' + m['reasoning_content'] + '\n</think>\n\n' + m['content'] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|system|>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['name'] %}{{ m['name'] + ':' }}{% endif %}"
    "{{ m['content'] }}{% for call in m['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer(
    *,
    merges: Sequence[tuple[str, str]] = (),
    chat_template: str | None = None,
    plain_text: str = "<s> $A",
    eos_token: str | None = "</s>",
    pad_token: str | None = "<pad>",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 265 tokens and the given merges; `plain_text` is what surrounds text without a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=plain_text, special_tokens=[(token, ids[token]) for token in ("<s>", "</s>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos_token, pad_token=pad_token
    )
    tokenizer.chat_template = chat_template
    return tokenizer
