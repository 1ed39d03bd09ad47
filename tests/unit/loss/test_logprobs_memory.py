"""What the fused head takes beside inputs and results, as the kernel counts it: the budget, however long the stream."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))  # as `python tools/bench/logprob.py` has it

from bench.head_child import SELF, HeadJob
from bench.logprob import measure_memory

MIB = 2**20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_logits_take_what_they_may_and_no_more() -> None:
    """Under no_grad as in training; the longest run scores more than six times as many rows as fit at a time.

    Below 32 MiB the C library would keep freed memory, and the figure would be of its making.
    """
    job = HeadJob(
        runs=((1024, False), (1024, True), (4096, True)),
        vocab=32003,
        hidden=16,
        prompt_share=0.5,
        dtype="fp32",
        logits_mib=40,
        variants=(SELF,),
        turns=0,
    )
    assert job.chunk_bytes < 4 * 32003 * min(512, 2048 / 6)
    scored, short, long = measure_memory(job, threads=1)
    assert short.beside_rows <= 2.5 * job.chunk_bytes
    assert long.beside_rows == pytest.approx(short.beside_rows, rel=0.05)
    for memory in (scored, short, long):
        assert 0.85 * 40 * MIB < memory.beside_rows < 1.05 * 40 * MIB
