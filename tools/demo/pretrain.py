"""The starting policy: a tiny Llama and a tokenizer, taught both kinds of answers by language modelling."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo import corpus

VOCABULARY = 509  # a prime: no tensor-parallel size divides it, so the padded vocabulary is exercised
SPECIAL_TOKENS = ("<pad>", "<s>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of VOCABULARY tokens on the demonstration's sentences."""
    rng = random.Random(0)
    texts = []
    for situation in islice(corpus.situations(rng, held_out=False), 4000):
        texts += [situation.question, *corpus.answers(situation, rng)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the demo's tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>", model_max_length=128
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """Builds a random fp32 Llama of 4 layers whose heads (4, with 2 of keys and values) split over 2 tensor ranks."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def chat_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], *, prompt: bool) -> list[int]:
    """Token ids of a conversation; `prompt` adds the beginning of the assistant's turn."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=prompt)[
        "input_ids"
    ]


def collate(sequences: list[tuple[list[int], int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded int64 [B, T] ids, attention mask and labels; labels are −100 on the prompt and on padding."""
    longest = max(len(ids) for ids, _ in sequences)
    ids_BT = torch.full((len(sequences), longest), pad_id)
    labels_BT = torch.full((len(sequences), longest), -100)
    mask_BT = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, (ids, prompt_length) in enumerate(sequences):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
        mask_BT[row, : len(ids)] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    prompts_per_step: int,
    lr: float,
    seed: int,
) -> list[float]:
    """Teaches both kinds of answers to fresh training prompts, in place; returns the loss of every step, in nats/token.

    Every prompt is shown once with each kind, so the model learns to answer, but no preference.
    """
    rng = random.Random(seed)
    stream = corpus.situations(rng, held_out=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    bar = (TextColumn("teaching both kinds of answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar, TextColumn("loss {task.fields[loss]}")) as progress:
        task = progress.add_task("teach", total=steps, loss="—")
        for _ in range(steps):
            batch = collate(_both_answers(tokenizer, stream, rng, prompts_per_step), tokenizer.pad_token_id)
            loss = model(**batch, use_cache=False).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=f"{losses[-1]:.3f}")
    return losses


def _both_answers(
    tokenizer: PreTrainedTokenizerFast, stream: Iterator[corpus.Situation], rng: random.Random, n: int
) -> list[tuple[list[int], int]]:
    """Returns (ids, prompt length) of 2·n sequences: `n` situations, each with a courteous and a curt answer."""
    sequences = []
    for situation in islice(stream, n):
        user = {"role": "user", "content": situation.question}
        prompt_length = len(chat_ids(tokenizer, [user], prompt=True))
        for answer in corpus.answers(situation, rng):
            ids = chat_ids(tokenizer, [user, {"role": "assistant", "content": answer}], prompt=False)
            sequences.append((ids, prompt_length))
    return sequences


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes the Hugging Face directory: configuration, fp32 safetensors, tokenizer and chat template."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
