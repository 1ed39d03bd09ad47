"""Environment of every test: one thread a process, no network. Set before torch or transformers are imported."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes outnumber the cores of a CI machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads and forked workers deadlock
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"
