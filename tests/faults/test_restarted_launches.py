"""What ranks that torchrun has started again know of their launch, whichever machine's rank has died."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.cluster import environment
from tests.helpers.ports import free_port

# Rank 0 notes its launch and waits; rank 1 dies once that is done; started again, both end.
RANK = """
import json, os, sys, time
from pathlib import Path
from megadpo.setup.launch import find_launch, note_launch

run_dir = Path(sys.argv[1])
if os.environ["RANK"] == "0":
    launch = find_launch(run_dir)
    again = (run_dir / ".launch.json").exists()
    note_launch(run_dir, launch)
    with (run_dir / "starts").open("a") as file:
        print(json.dumps([os.environ["TORCHELASTIC_RESTART_COUNT"], launch.began, launch.met]), file=file)
else:
    again = (run_dir / "died").exists()
    while not (run_dir / ".launch.json").exists():
        time.sleep(0.1)
    (run_dir / "died").touch()
    sys.exit(0 if again else 1)
time.sleep(0 if again else 60)
"""


def test_a_death_on_another_machine_leaves_the_launch_what_it_is(tmp_path: Path) -> None:
    """torchrun doesn't count the restart where rank 0 is."""
    (tmp_path / "rank.py").write_text(RANK)
    meeting = f"localhost:{free_port()}"
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                *("--max-restarts=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}", "--rdzv-id=megadpo"),
                *(f"--rdzv-conf=is_host={node == 0}", "--local-addr", ("127.0.0.1", "localhost")[node]),
                *(str(tmp_path / "rank.py"), str(tmp_path)),
            ],
            env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        said = [agent.communicate(timeout=200)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # not kill, which its rank would outlive
    assert [agent.returncode for agent in agents] == [0, 0], said
    first, second = [json.loads(line) for line in (tmp_path / "starts").read_text().splitlines()]
    assert [first[0], second[0]] == ["0", "0"]
    assert first[1:] == second[1:]
