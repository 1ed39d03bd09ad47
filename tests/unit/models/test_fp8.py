"""FP8: what is left of a number under each recipe, what the recipes ask of a run, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from omegaconf import OmegaConf

from megadpo.config.compose import compose_config, config_from_yaml
from megadpo.config.schema import Config
from megadpo.config.validation import ModelShape, validate
from megadpo.errors import ConfigError
from megadpo.models import fp8 as fp8_module
from megadpo.models.fp8 import Fp8, unaligned_features, why_not_fp8
from megadpo.models.fp8_emulation import AmaxHistory, fake_quantize
from megadpo.models.fp8_recipes import default_format, feature_multiple, token_multiple
from megadpo.models.hf_config import Architecture, parse_architecture, read_architecture
from megadpo.models.quantised import without_fp8
from megadpo.runtime.device import Device
from megadpo.setup import options
from megadpo.setup.model_source import ModelSource
from megadpo.setup.session import Session
from tests.helpers.device_checks import fp8_words, run_words

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# What is left of a number


def by_hand(value: float, scale: float, mantissa_bits: int) -> float:
    """value · scale rounded to so many bits behind the leading one, to even, and scaled back."""
    scaled = value * scale
    unit = 2.0 ** (math.floor(math.log2(abs(scaled))) - mantissa_bits)
    return round(scaled / unit) * unit / scale


@pytest.mark.parametrize(("dtype", "largest", "bits"), [(E4M3, 448.0, 3), (E5M2, 57344.0, 2)])
def test_a_tensors_largest_value_makes_its_scale(dtype: torch.dtype, largest: float, bits: int) -> None:
    values = [[3.0, -0.7], [0.1234, -1.999]]
    left = fake_quantize(torch.tensor(values), dtype, "tensorwise", contracted=1)
    scale = largest / 3.0
    expected = [[by_hand(value, scale, bits) for value in row] for row in values]
    torch.testing.assert_close(left, torch.tensor(expected), rtol=1e-6, atol=0)
    assert left[0, 0] == pytest.approx(3.0, rel=1e-6)
    assert fake_quantize(torch.zeros(2, 2), dtype, "tensorwise", contracted=1).abs().max() == 0


@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize(("recipe", "size"), [("blockwise", 128), ("mxfp8", 32)])
def test_blocks_have_scales_of_their_own_along_the_contraction(recipe: str, size: int, contracted: int) -> None:
    """Two blocks a line, one of large and one of small numbers; the last one is not full."""
    line = torch.cat([torch.full((size,), 1000.0), torch.linspace(0.001, 0.011, size // 2)])
    lines = torch.stack([line, line * 5])
    matrix = lines if contracted == 1 else lines.t()
    left = fake_quantize(matrix, E4M3, recipe, contracted=contracted)
    left = left if contracted == 1 else left.t()
    # A scale is a power of two, so that the rounding of a value is relative to itself alone: half of 2^-3.
    assert ((left - lines).abs() <= lines.abs() * 2**-4).all()
    for row in range(2):
        small = lines[row, size:]
        scale = 2.0 ** math.floor(math.log2(448 / float(small.max())))
        expected = torch.tensor([by_hand(float(value), scale, 3) for value in small])
        normal = small * scale >= 2**-6
        torch.testing.assert_close(left[row, size:][normal], expected[normal], rtol=1e-6, atol=0)
    # One scale for all would lose the small ones.
    assert fake_quantize(lines, E4M3, "tensorwise", contracted=1)[0, size] == 0


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_values_too_small_for_a_scale_stay_numbers(recipe: str, dtype: torch.dtype) -> None:
    """As the gradients of pairs that have long been told apart are."""
    for value in (1e-30, 1e-36, 1e-40):
        left = fake_quantize(torch.tensor([[0.0, value, -value]]), dtype, recipe, contracted=1)
        assert left.isfinite().all() and left[0, 0] == 0
        assert (left.abs() <= 2 * value).all()


def test_weights_share_a_scale_in_squares_of_128() -> None:
    weight = torch.full((256, 128), 0.001)
    weight[0, 0] = 1000.0
    left = fake_quantize(weight, E4M3, "blockwise", contracted=1, is_weight=True)
    assert (left[1:128, 1:] == 0).all()  # beside the large one
    torch.testing.assert_close(left[128:], weight[128:], rtol=2**-4, atol=0)
    lines = fake_quantize(weight, E4M3, "blockwise", contracted=1)
    assert (lines[1:] > 0).all() and (lines[0, 1:] == 0).all()


def test_delayed_scaling_uses_what_it_has_seen() -> None:
    class Alone:
        def size(self) -> int:
            return 1

    history: Any = AmaxHistory(2, "max")
    latest: Any = AmaxHistory(2, "most_recent")
    cpu = torch.device("cpu")
    assert history.scale(E4M3, cpu) == 1
    for amax in (8.0, 2.0):
        for kept in (history, latest):
            kept.record(torch.tensor([amax, -amax / 2]), Alone())
    assert history.scale(E4M3, cpu) == 448 / 8 and latest.scale(E4M3, cpu) == 448 / 2
    history.record(torch.tensor([-1.0]), Alone())
    assert history.scale(E4M3, cpu) == 448 / 2  # the first is forgotten
    # What is larger than before is cut off.
    left = fake_quantize(torch.tensor([[4.0, 1.0]]), E4M3, "delayed", contracted=1, scale=history.scale(E4M3, cpu))
    assert left.tolist() == [[2.0, 1.0]]


# What a recipe asks for


@pytest.mark.parametrize(
    ("recipe", "tensor", "context", "sequence_parallel", "expected"),
    [
        (None, 4, 1, True, 4),
        (None, 4, 1, False, 1),
        ("tensorwise", 1, 1, False, 16),
        ("tensorwise", 2, 1, True, 16),
        ("tensorwise", 8, 1, True, 64),
        ("delayed", 4, 1, False, 16),
        ("mxfp8", 8, 1, True, 256),
        ("blockwise", 1, 2, False, 256),
        ("blockwise", 8, 1, True, 1024),
    ],
)
def test_tokens_come_in_multiples(
    recipe: str | None, tensor: int, context: int, sequence_parallel: bool, expected: int
) -> None:
    found = token_multiple(recipe, tensor=tensor, context=context, sequence_parallel=sequence_parallel)
    assert found == expected


def test_formats_and_features() -> None:
    assert [default_format(name) for name in ("tensorwise", "delayed", "blockwise", "mxfp8")] == [
        *("hybrid", "hybrid", "e4m3", "e4m3")
    ]
    assert [feature_multiple(name) for name in ("tensorwise", "delayed", "blockwise", "mxfp8")] == [16, 16, 128, 32]


def arch(**fields: Any) -> Architecture:
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1001,
        "tie_word_embeddings": False,
    }
    return parse_architecture({**shape, **fields}, source="test")


def test_features_of_a_tensor_rank_must_fit_the_blocks() -> None:
    assert unaligned_features(arch(), "blockwise", tensor=2) is None
    assert unaligned_features(arch(), "tensorwise", tensor=8) is None  # (8 + 2 · 2) · 64 / 8 = 96
    assert unaligned_features(arch(), "blockwise", tensor=8) == (
        "needs multiples of 128, a tensor rank's are: query features 64, query, key and value features 96, "
        "feed-forward features 192"
    )
    # Two ranks share a key-value head: 16 + 4 heads of 128 over 8 ranks.
    shared = arch(hidden_size=2048, num_attention_heads=16, intermediate_size=8192)
    assert unaligned_features(shared, "blockwise", tensor=8) == (
        "needs multiples of 128, a tensor rank's are: query, key and value features 320"
    )
    assert unaligned_features(arch(hidden_size=520, head_dim=64), "tensorwise", tensor=1) == (
        "needs multiples of 16, a tensor rank's are: hidden size 520"
    )


def quantising(recipe: str, *, emulated: bool = False) -> Fp8:
    return Fp8(recipe=recipe, format=default_format(recipe), emulated=emulated)


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "problem"),
    [
        ("tensorwise", (9, 0), "12.6", None),
        ("tensorwise", (8, 9), "12.6", None),
        ("tensorwise", (8, 0), "12.6", "needs a card with FP8 (compute capability 8.9 or newer), this one has 8.0"),
        ("blockwise", (9, 0), "12.9", None),
        ("blockwise", (9, 0), "12.8", "needs torch for CUDA 12.9 or newer, this one is for 12.8"),
        ("blockwise", (10, 0), "13.0", "needs a Hopper card (compute capability 9.0), this one has 10.0"),
        ("mxfp8", (10, 3), "13.0", None),
        ("mxfp8", (9, 0), "13.0", "needs a Blackwell card (compute capability 10.x), this one has 9.0"),
    ],
)
def test_a_card_is_asked_for_by_recipe(
    recipe: str, capability: tuple[int, int], cuda: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "compute_capability", lambda self: capability)
    monkeypatch.setattr(fp8_module, "why_not_transformer_engine", lambda device, dtype: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    device = Device("cuda", torch.device("cpu"))
    assert why_not_fp8(quantising(recipe), device, torch.bfloat16) == problem
    monkeypatch.setattr(fp8_module, "why_not_transformer_engine", lambda device, dtype: "it is missing")
    assert why_not_fp8(quantising(recipe), device, torch.bfloat16) == "it is missing"
    assert why_not_fp8(quantising(recipe, emulated=True), device, torch.bfloat16) is None


def test_fp8_without_a_backend_is_refused(tmp_path: Path) -> None:
    """Megatron would train on without it."""
    config = built(tmp_path, "precision.fp8=tensorwise", "parallel.tensor=4")
    models = (arch(), arch(head_dim=20))  # the reference's sizes count too
    said = options.fp8_problems(config, models, Device("cpu", torch.device("cpu")))
    assert said[0].startswith("precision.fp8=tensorwise: needs a CUDA device: set device.kind=cuda")
    assert said[1].startswith(
        "precision.fp8=tensorwise: needs multiples of 16, a tensor rank's are: query features 40, query, key and value"
    )
    assert all("precision.fp8_backend=emulate shows the recipe's effect" in line for line in said)
    unused: Any = None
    device, source = Device("cpu", torch.device("cpu")), ModelSource(tmp_path, checkpoint=None)
    session = Session(config, unused, device, source, arch(), source, arch())
    with pytest.raises(ConfigError) as caught:
        options.check_and_log_options(session, trains=True)
    assert len(caught.value.violations) == 1


def test_megatron_gets_the_settings_of_kernels_and_none_of_an_emulation() -> None:
    assert quantising("tensorwise", emulated=True).megatron_fields() == {}
    fp8 = Fp8(recipe="blockwise", format="e4m3", emulated=False, num_layers_at_end_in_bf16=1)
    fields = fp8.megatron_fields()
    assert (fields["fp8"], fields["fp8_recipe"], fields["first_last_layers_bf16"]) == ("e4m3", "blockwise", True)
    assert fields["num_layers_at_end_in_bf16"] == 1 and fields["num_layers_at_start_in_bf16"] == 0
    assert [fp8.covers(layer, 3) for layer in range(3)] == [True, True, False]


def test_a_model_computes_without_fp8_for_a_moment() -> None:
    """By the configuration, which Megatron asks in every pass."""
    model = GPTModel.__new__(GPTModel)
    torch.nn.Module.__init__(model)
    model.config = type("Config", (), {"fp8": "hybrid"})()
    with without_fp8([torch.nn.ModuleList([model])]):
        assert model.config.fp8 is None
    assert model.config.fp8 == "hybrid"


# What is refused


def built(root: Path, *words: str) -> Config:
    model = root / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (root / "pairs.jsonl").write_text("{}\n")
    given = ["model.name=hf", f"model.hf_path={model}", f"data.train_path={root / 'pairs.jsonl'}", *words]
    return config_from_yaml(OmegaConf.to_yaml(OmegaConf.from_dotlist(given)))


EMULATED = "precision.fp8_backend=emulate"
SHAPE = ModelShape(num_layers=8, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=256, vocab_size=1000)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            [EMULATED],
            "precision.fp8_backend=emulate: has no effect with precision.fp8=null: drop it, or choose a recipe",
        ),
        (["precision.fp8_check_every=5"], "precision.fp8_check_every=5: has no effect with precision.fp8=null"),
        (
            ["precision.fp8=mxfp8", EMULATED, "precision.fp8_amax_history_len=16"],
            "precision.fp8_amax_history_len=16: has no effect with precision.fp8=mxfp8: drop it, or use "
            "precision.fp8=delayed",
        ),
        (
            ["precision.fp8=mxfp8", EMULATED, "precision.fp8_check_pairs=9"],
            "precision.fp8_check_pairs=9: has no effect with precision.fp8_check_every=null: drop it, or set that",
        ),
        (
            ["precision.fp8=tensorwise", "device.kind=cpu"],
            "precision.fp8=tensorwise: needs CUDA with Transformer Engine, it is device.kind=cpu",
        ),
        (
            ["precision.fp8=tensorwise", "precision.dtype=fp32"],
            "precision.fp8=tensorwise: Transformer Engine's FP8 needs precision.dtype=bf16, it is fp32",
        ),
        (
            ["precision.fp8=tensorwise", "precision.backend=native"],
            "precision.fp8_backend=transformer_engine: needs its layers, it is precision.backend=native",
        ),
        (
            ["precision.fp8=tensorwise", EMULATED, "precision.backend=transformer_engine"],
            "precision.fp8_backend=emulate: needs native layers, it is precision.backend=transformer_engine",
        ),
        (
            ["precision.fp8=delayed", EMULATED],
            "precision.fp8=delayed: does not go with reference.mode=resident: its scales follow the passes",
        ),
        *(
            (
                ["precision.fp8=delayed", EMULATED, f"reference.mode={mode}"],
                f"precision.fp8=delayed: does not go with reference.mode={mode}: its scales follow the passes",
            )
            for mode in ("offload", "cached")
        ),
        (
            ["precision.fp8=tensorwise", EMULATED, "reference.mode=cached"],
            "precision.fp8=tensorwise: does not go with reference.mode=cached: all tokens of a microbatch share a ",
        ),
        (
            ["precision.fp8=mxfp8", EMULATED, "reference.mode=cached", "precision.fp8_check_every=5"],
            "precision.fp8_check_every=5: needs a reference to score with and without FP8, reference.mode=cached has",
        ),
        (
            ["precision.fp8=blockwise", EMULATED, "data.tokens_per_microbatch=1000"],
            "data.tokens_per_microbatch=1000: must be a multiple of 128 tokens with precision.fp8=blockwise at "
            "parallel.tensor=1, to which streams are padded: use 896 or 1024",
        ),
        (
            ["precision.fp8=mxfp8", EMULATED, "parallel.tensor=2", "data.tokens_per_microbatch=32"],
            "must be a multiple of 64 tokens with precision.fp8=mxfp8 at parallel.tensor=2, to which streams are "
            "padded: use 64",
        ),
        (
            ["precision.fp8=mxfp8", EMULATED, "precision.num_layers_at_start_in_bf16=5", "parallel.pipeline=2"],
            "each must be at most the 4 layers of a pipeline stage: lower them",
        ),
        (
            [
                "precision.fp8=mxfp8",
                EMULATED,
                "precision.num_layers_at_start_in_bf16=4",
                "precision.num_layers_at_end_in_bf16=4",
            ],
            "leave none of a model's 8 layers for FP8: lower them",
        ),
    ],
)
def test_what_does_not_go_together_is_said(words: list[str], says: str, tmp_path: Path) -> None:
    config = built(tmp_path, *words)
    world_size = config.parallel.tensor * config.parallel.pipeline
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=world_size, shape=SHAPE)
    assert any(says in line for line in caught.value.violations), caught.value.violations


def test_a_references_layers_count_too(tmp_path: Path) -> None:
    words = ["precision.fp8=mxfp8", EMULATED, "precision.num_layers_at_start_in_bf16=2", "parallel.pipeline=2"]
    config = built(tmp_path, *words, f"reference.hf_path={tmp_path / 'model'}")
    validate(config, world_size=2, shape=SHAPE, reference_shape=SHAPE)
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=2, shape=SHAPE, reference_shape=replace(SHAPE, num_layers=2))
    assert len(caught.value.violations) == 2
    assert "each must be at most the 1 layers of a pipeline stage" in caught.value.violations[0]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_the_words_of_the_tests_on_gpus_are_taken(recipe: str, tmp_path: Path) -> None:
    config = compose_config([*run_words(tmp_path, "run", "device.kind=cuda"), *fp8_words(recipe)])
    validate(config, world_size=1)
    models = (read_architecture(config.model.hf_path),)
    said = options.fp8_problems(config, models, Device("cpu", torch.device("cpu")))
    assert len(said) == 1 and "needs a CUDA device" in said[0]


def test_delayed_scaling_is_taken_where_no_reference_is(tmp_path: Path) -> None:
    words = ["precision.fp8=delayed", EMULATED, "precision.fp8_amax_history_len=4", "precision.fp8_check_every=5"]
    validate(built(tmp_path, *words, "reference.mode=none", "loss.name=simpo"), world_size=1, shape=SHAPE)


def test_what_goes_together_is_taken(tmp_path: Path) -> None:
    words = ["precision.fp8=mxfp8", EMULATED, "precision.fp8_check_every=5", "precision.fp8_format=hybrid"]
    validate(built(tmp_path, *words, "precision.num_layers_at_start_in_bf16=1"), world_size=1, shape=SHAPE)
