"""Rules of the groups cluster and plan: the machines to plan for, and assumptions about the pairs."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter

from megadpo.config.schema import Config, show
from megadpo.runtime.gpus import GPUS


def check_cluster(config: Config, *, planning: bool) -> list[str]:
    """Violations of the groups cluster and plan, which only planning and dry runs read."""
    if planning:
        return _check_planning(config)
    dry_run = config.train.dry_run
    inert = [
        (f"{group}.{item.name}", attrgetter(f"{group}.{item.name}")(config))
        for group, settings in (("cluster", config.cluster), ("plan", config.plan))
        for item in fields(settings)
        if attrgetter(item.name)(settings) != item.default
        and not (dry_run and group == "cluster" and item.name != "gpus")
    ]
    remedy = (
        "a dry run has the launch's ranks and the data's lengths: drop it, or use tools/plan.py"
        if dry_run
        else "it is for tools/plan.py (and cluster.* for train.dry_run=true): drop it"
    )
    violations = [f"{key}={show(value)}: has no effect here: {remedy}" for key, value in inert]
    return [*violations, *_check_gpu(config)] if dry_run else violations


def _check_planning(config: Config) -> list[str]:
    cluster, plan, data = config.cluster, config.plan, config.data
    violations = _check_gpu(config)
    if cluster.gpus is None:
        violations.append("cluster.gpus=null: the number of cards is needed: add cluster.gpus=N")
    if cluster.gpu is None and cluster.memory_gib is None:
        violations.append(
            f"cluster.gpu=null: the kind of card is needed: add cluster.gpu=NAME, one of {', '.join(GPUS)}, or "
            "cluster.memory_gib=GIB of another"
        )
    if config.train.dry_run:
        violations.append("train.dry_run=true: has no effect here: drop it, or start tools/train.py with it")
    given = [name for name in ("prompt_tokens", "response_tokens") if attrgetter(name)(plan) is not None]
    if data.train_path:
        violations += [
            f"plan.{name}={attrgetter(name)(plan)}: has no effect with data.train_path, whose lengths are taken: drop "
            "one of the two"
            for name in given
        ]
    quarter = data.max_length // 4
    length = (plan.prompt_tokens or quarter) + (plan.response_tokens or quarter)
    if given and length > data.max_length:
        keys = ", ".join(f"plan.{name}={attrgetter(name)(plan)}" for name in given)
        violations.append(
            f"{keys}: prompt and response are {length} tokens, data.max_length={data.max_length} keeps fewer: lower "
            "them, or raise it"
        )
    return violations


def _check_gpu(config: Config) -> list[str]:
    cluster = config.cluster
    known = cluster.gpu in GPUS
    violations = []
    if cluster.gpu is not None and not known and cluster.memory_gib is None:
        violations.append(
            f"cluster.gpu={cluster.gpu}: must be one of {', '.join(GPUS)}: give cluster.memory_gib=GIB for another"
        )
    if cluster.network_gb_per_s is not None and not known and not (cluster.gpu is None and config.train.dry_run):
        violations.append(
            f"cluster.network_gb_per_s={show(cluster.network_gb_per_s)}: has no effect with "
            f"cluster.gpu={show(cluster.gpu)}, of which no rates are known: drop it, or name one of {', '.join(GPUS)}"
        )
    return violations
