"""Megatron's requests for CUDA are answered on the CPU inside the context, and nowhere else."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.tensor_parallel import random as megatron_random

from megadpo.errors import ConfigError
from megadpo.runtime.device import Device, megatron_device, select_device

CPU = Device("cpu", torch.device("cpu"))
PATCHED = (torch, torch.cuda, torch.Tensor, megatron_random, layers, mappings, param_and_grad_buffer)


def attributes() -> list[dict[str, Any]]:
    """Every attribute of everything that the context may touch."""
    return [dict(vars(owner)) for owner in PATCHED]


def assert_untouched(before: list[dict[str, Any]]) -> None:
    for owner, old, new in zip(PATCHED, before, attributes(), strict=True):
        changed = [name for name in old.keys() | new.keys() if old.get(name) is not new.get(name)]
        assert not changed, f"{owner.__name__}: {changed}"


@pytest.fixture(scope="module", autouse=True)
def _lazy_modules_loaded() -> None:
    """Entering once imports what torch imports late, so that comparisons see the context's own changes only."""
    with megatron_device(CPU):
        pass


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [("tensor", ([1.0],)), ("zeros", (2,)), ("ones", (2,)), ("empty", (2,)), ("full", ((2,), 3.0))],
)
def test_factories_asked_for_cuda_give_cpu_tensors(factory: str, arguments: tuple[Any, ...]) -> None:
    with megatron_device(CPU):
        make = getattr(torch, factory)
        assert make(*arguments, device="cuda").device.type == "cpu"
        assert make(*arguments, dtype=torch.float64, device="cuda").dtype is torch.float64
        assert make(*arguments).device.type == "cpu"
        assert make(*arguments, device="meta").device.type == "meta"  # other devices are left alone


def test_values_of_patched_factories() -> None:
    with megatron_device(CPU):
        assert torch.full((2,), 3.0, device="cuda").tolist() == [3.0, 3.0]
        assert torch.tensor([1, 2], device="cuda").tolist() == [1, 2]
        assert torch.zeros(2, device="cuda").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_the_main_gradient(dtype: torch.dtype) -> None:
    inputs, grads = torch.randn(6, 3).to(dtype), torch.randn(6, 4).to(dtype)
    main_grad = torch.ones(4, 3)
    with megatron_device(CPU):
        assert layers._grad_accum_fusion_available
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, grads, main_grad)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(main_grad, 1 + grads.float().t() @ inputs.float(), rtol=tolerance, atol=tolerance)


def test_tensor_types_are_named_as_on_cuda() -> None:
    """The optimizers compare with 'torch.cuda.FloatTensor'; a conversion still converts."""
    with megatron_device(CPU):
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        converted = torch.zeros(1).type(torch.float64)
        assert converted.dtype is torch.float64
        tensor = torch.zeros(1)
        assert tensor.cuda() is tensor
        assert tensor.cuda(0, non_blocking=True) is tensor
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_cuda_calls_are_answered() -> None:
    with megatron_device(CPU):
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def test_random_state_is_the_cpu_generators() -> None:
    """Megatron keeps and restores states around its random regions: what is restored is drawn again."""
    with torch.random.fork_rng(devices=[]), megatron_device(CPU):
        for get, put in (
            (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
            (megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state),
        ):
            torch.cuda.manual_seed(5)
            state = get()
            drawn = torch.rand(3)
            put(state)
            assert torch.equal(torch.rand(3), drawn)
            torch.manual_seed(5)
            assert torch.equal(torch.rand(3), drawn)


def test_nothing_is_compiled_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    calls = []

    def refuse(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x + 1, backend=refuse)
    with megatron_device(CPU):
        assert function(torch.ones(1)).item() == 2.0
        assert calls == []
    function(torch.ones(1))
    assert len(calls) == 1


def test_everything_is_restored() -> None:
    before = attributes()
    with megatron_device(CPU):
        assert torch.zeros is not before[0]["zeros"]
    assert_untouched(before)


def test_everything_is_restored_after_an_error() -> None:
    before = attributes()
    with pytest.raises(KeyError), megatron_device(CPU):
        raise KeyError
    assert_untouched(before)


def test_nothing_changes_on_cuda() -> None:
    before = attributes()
    with megatron_device(Device("cuda", torch.device("cuda", 0))):
        assert_untouched(before)


@pytest.mark.parametrize("found", ["0.12.0", "0.16.0", "0.17.0rc0", "0.17.0", "1.0"])
@pytest.mark.parametrize("device", [CPU, Device("cuda", torch.device("cuda", 0))], ids=lambda d: d.kind)
def test_an_untested_megatron_is_refused(found: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"megatron-core": found}[name])
    before = attributes()
    with pytest.raises(ConfigError, match=rf"megatron-core {found} is installed.*>=0\.16\.1,<0\.17"):  # noqa: SIM117
        with megatron_device(device):
            pytest.fail("the context was entered")
    assert_untouched(before)


@pytest.mark.parametrize("found", ["0.16.1", "0.16.2", "0.16.1+nv25.1"])
def test_the_tested_range_is_accepted(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"megatron-core": found}[name])
    with megatron_device(CPU):
        assert torch.zeros(1, device="cuda").device.type == "cpu"


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cuda_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_cuda_without_a_cuda_device_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_devices(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"device\.kind=cuda: torch sees no CUDA device"):
        select_device("cuda")


@pytest.mark.usefixtures("threads")
def test_auto_takes_the_cpu_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_devices(monkeypatch, 0)
    device = select_device("auto")
    assert device == CPU
    assert device.backend == "gloo"


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_each_local_rank_takes_its_own_card(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    cuda_devices(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    device = select_device(kind)
    assert device == Device("cuda", torch.device("cuda", 1))
    assert device.backend == "nccl"
    assert taken == [1]


def test_more_ranks_than_cards_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_devices(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"--nproc-per-node is larger than the 2 CUDA devices.*LOCAL_RANK=2"):
        select_device("cuda")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("local_ranks", "threads_each"), [(1, 6), (2, 3), (4, 1), (12, 1)])
def test_local_ranks_share_the_cores(local_ranks: int, threads_each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadpo.runtime.device.usable_cpus", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    select_device("cpu")
    assert torch.get_num_threads() == threads_each


@pytest.mark.usefixtures("threads")
def test_without_a_launcher_the_users_number_of_threads_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadpo.runtime.device.usable_cpus", lambda: 6)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    select_device("cpu")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
    ],
)
def test_peak_rates_of_cards(card: str, tflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert Device("cuda", torch.device("cuda", 0)).peak_flops(torch.bfloat16) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("card", "dtype"),
    [
        ("NVIDIA RTX A1000", torch.bfloat16),
        ("NVIDIA H100 80GB HBM3", torch.float32),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16),
    ],
)
def test_a_card_of_unknown_rate_is_named(
    card: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert Device("cuda", torch.device("cuda", 0)).peak_flops(dtype) is None
    assert f"throughput/mfu is left out: no peak rate is known for {card} in" in caplog.text


def test_a_cpu_has_no_peak_rate_and_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    assert CPU.peak_flops(torch.bfloat16) is None
    assert caplog.text == ""


def test_peak_memory_is_in_bytes() -> None:
    """A process with torch in it takes between 50 MiB and 50 GiB."""
    assert 50 * 2**20 < CPU.peak_memory_bytes() < 50 * 2**30


def test_cpu_is_refused_where_megatron_has_bound_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", True)
    before = attributes()
    said = r"device.kind=cpu: Transformer Engine or apex is installed"
    with pytest.raises(ConfigError, match=said), megatron_device(CPU):
        pytest.fail("the context was entered")
    assert_untouched(before)
