"""Reads the transaction logs that W&B writes: what an upload would send."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_FILE_HEADER, _RECORD_HEADER, _BLOCK = 7, 7, 32768
_FULL, _LAST = 1, 4


def wandb_records(log: Path) -> Iterator[Any]:
    """The protobuf records of a `.wandb` file (LevelDB's log format) in order."""
    data = log.read_bytes()
    position, pieces = _FILE_HEADER, b""
    while position + _RECORD_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD_HEADER:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        position += _RECORD_HEADER
        pieces += data[position : position + size]
        position += size
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


def wandb_runs(run_dir: Path) -> list[dict[str, Any]]:
    """One dict per W&B directory of a run, oldest first: id, project, name, config, rows by step, exit_code."""
    runs = []
    for log in sorted((run_dir / "wandb").glob("*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        found: dict[str, Any] = {"rows": {}, "exit_code": None}
        for record in wandb_records(log):
            if record.HasField("run"):
                run = record.run
                found.update(id=run.run_id, project=run.project, name=run.display_name)
                found["config"] = {item.key: json.loads(item.value_json) for item in run.config.update}
            elif record.HasField("history"):
                row = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                step = row.pop("_step")
                assert step not in found["rows"]
                found["rows"][step] = {key: value for key, value in row.items() if not key.startswith("_")}
            elif record.HasField("exit"):
                found["exit_code"] = record.exit.exit_code
        runs.append(found)
    return runs
