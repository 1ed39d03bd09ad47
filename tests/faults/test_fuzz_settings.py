"""Two thousand odd words through the configuration: a valid one, or one ConfigError that names each key at fault."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from megadpo.commands.command_line import check
from megadpo.config.compose import compose_config, config_from_yaml, config_to_yaml
from megadpo.config.schema import Config
from megadpo.config.typed import known_keys
from megadpo.errors import ConfigError
from tests.faults.cases.case import row
from tests.helpers.tiny_models import write_tiny_model
from tests.unit.config.test_validation import KEYS

LAUNCHES = 450
SECONDS = 20.0
"""for one launch, which takes a tenth of a second"""

NUMBERS = ["0", "-1", "1.5", "1e400", "-inf", "nan", "9" * 400, "9" * 5000, "1_000", "0x10", "1:30", "2024-01-01"]
TEXTS = ["", "''", "' '", "null", "~", "yes", "héé", "\u2028", "\0", "\ud800", "a" * 10_000, "/etc/passwd", "..", "???"]
NESTED = ["[]", "{}", "{a: 1}", "{1: 2}", "{null: 1}", "{a: {b: [1]}}", "[[1], [2]]", "[null]", "{a.b: 1}"]
NESTED += ["[" * depth + "]" * depth for depth in (15, 17, 400, 3000)] + ["{a:" * 300 + "1" + "}" * 300]
HYDRA = [
    "1,2",
    "choice(1,2)",
    "range(1,5)",
    "int(x)",
    "str(3)",
    "shuffle(1,2)",
    "glob(*)",
    "extend_list(1)",
    "a=b",
    "a:b",
]
HYDRA += ["${train}", "${train.seed}", "${nope}", "${oc.env:NOPE}", "${oc.create:{a: 1}}", "${hydra:runtime.cwd}", "${"]
BROKEN = ["[1", "{a", "(", ")", "'", '"', "'\"", "\\", "\t", "\n", "@", "*", "&a", "!!python/object/apply:os.getcwd []"]
ODD = [*NUMBERS, *TEXTS, *NESTED, *HYDRA, *BROKEN]
# Keys whose good value of the table serves beside all others.
HARMLESS = ["train.seed", "train.epochs", "train.log_every", "optimizer.weight_decay", "optimizer.eps", "loss.beta"]
HARMLESS += ["data.prompt_key", "data.on_error", "data.truncation", "optimizer.clip_grad", "train.shuffle"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that are a valid configuration."""
    root = tmp_path_factory.mktemp("settings")
    (root / "pairs.jsonl").write_text(row())
    model = write_tiny_model(root / "model", "llama", num_layers=1)
    return ["+model=hf", f"model.hf_path={model}", f"data.train_path={root / 'pairs.jsonl'}", "device.kind=cpu"]


def misspelled(key: str, rng: random.Random) -> str:
    """A key that there is not."""
    other = rng.choice([f"{key}x", key[:-1], key.upper(), f"x.{key}", f"{key.partition('.')[0]}x.none", f"{key}_{key}"])
    return other if other not in KEYS and not any(known.startswith(f"{other}.") for known in KEYS) else f"{key}x"


def odd_word(rng: random.Random) -> str:
    """A word that may be anything: it must be taken or refused."""
    key, value = rng.choice(list(KEYS)), rng.choice(ODD)
    if rng.random() < 0.3:
        key = rng.choice([key.partition(".")[0], f"{key}@p", f"{key}/x", f"{key}.", f".{key}", f"{key}[0]", f"{key}.0"])
    if rng.random() < 0.3:
        mark = rng.choice(["+", "++", "~", "-", "--", "", "!", "@", "="])
        return rng.choice(
            [f"{mark}{key}={value}", f"{mark}{key}", f"{key}={value}={value}", f"+experiment={value}", mark]
        )
    return f"{key}={value}"


def launch(rng: random.Random) -> tuple[str, list[str], set[str]]:
    """good, odd or wrong; the words of such a launch; and what an error must name of them."""
    kind = rng.choice(["good", "odd", "odd", "odd", "wrong", "wrong", "wrong"])
    if kind == "good":
        keys = rng.sample(HARMLESS, rng.randint(1, 8))
        return (
            kind,
            [f"{key}={KEYS[key][rng.choice([0, 0, 2])]}" for key in keys] + [f"{k}={KEYS[k][0]}" for k in keys],
            set(),
        )
    if kind == "odd":
        return kind, [odd_word(rng) for _ in range(rng.choice([1, 1, 4, 8]))], set()
    words, named = [], set()
    for key in rng.sample([key for key in KEYS if not key.startswith("model.")], rng.randint(1, 8)):
        if rng.random() < 0.4:
            key, value = misspelled(key, rng), rng.choice(["1", "x", "[a, b]", "null"])
        else:
            value = KEYS[key][2]
            words += [f"{key}={KEYS[key][0]}"] * rng.randint(0, 1)  # the last one wins
        words.append(f"{key}={value}")
        named.add(key)
    return kind, words, named


def composed(words: list[str]) -> Config | ConfigError:
    """What becomes of the words; nothing but a ConfigError comes out."""
    try:
        return compose_config(words, check=check)
    except ConfigError as error:
        return error


def test_words_are_a_configuration_or_an_error_that_names_them(base: list[str]) -> None:
    counts: Counter[str] = Counter()
    for number in range(LAUNCHES):
        kind, words, named = launch(random.Random(f"launch {number}"))
        start = time.perf_counter()
        result = composed([*base, *words])
        assert time.perf_counter() - start < SECONDS, words
        if isinstance(result, ConfigError):
            assert kind != "good", (words, str(result))
            assert result.violations and all(result.violations)
            unnamed = {key for key in named if not any(f"{key}=" in text for text in result.violations)}
            assert not unnamed, (unnamed, str(result))
        else:
            assert kind != "wrong", words
            assert config_from_yaml(config_to_yaml(result)) == result
        counts.update({"words": len(words), kind: 1, f"{kind} {type(result).__name__}": 1})
    assert counts["words"] >= 2_000, counts
    assert min(counts[name] for name in ("good", "wrong", "odd ConfigError")) > 40, counts
    assert counts["odd Config"] > 0, counts


# What once ended in a traceback.
CRASHES = {
    "endless digits": ("data.max_length=" + "9" * 5000, "data.max_length=9"),
    "key that is a number": ("train={1: 2}", "train.1=2: unknown key"),
    "brackets": ("optimizer.lr=" + "[" * 400 + "]" * 400, "optimizer.lr=...: nested too deeply"),
    "more brackets": ("optimizer.lr=" + "[" * 3000 + "]" * 3000, "optimizer.lr="),
    "more than a float": ("loss.beta=" + "9" * 400, "must be a number, as in loss.beta=0.1"),
}


@pytest.mark.parametrize("name", CRASHES)
def test_what_was_a_crash_is_a_message(base: list[str], name: str) -> None:
    word, message = CRASHES[name]
    with pytest.raises(ConfigError) as caught:
        compose_config([*base, word], check=check)
    assert any(message in text for text in caught.value.violations), str(caught.value)


def test_the_table_of_keys_is_whole() -> None:
    assert set(KEYS) == set(known_keys()) >= set(HARMLESS)
