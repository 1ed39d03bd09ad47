"""No secret and nothing that a terminal acts on is said, by errors or by the log."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from megadpo.commands.command_line import check
from megadpo.config.compose import compose_config
from megadpo.errors import ConfigError, DataError, redact
from megadpo.runtime.rank_logging import configure_logging, get_logger
from tests.helpers.pairs import read_pairs

TOKEN = "hf_SENTINELabcdefghijklmnopqrstuvwxyzab"
KEY = "SENTINEL" + "0" * 32
AWS_KEY = "/wJalrXUtn/FEMI/K7MDENG/bPxRfiCYSENTINEL"


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets of the environment, and what only sounds like one."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_KEY)
    monkeypatch.setenv("PGPASSWORD", "SENTINEL password")
    monkeypatch.setenv("my_account_key", "SENTINEL of an account")
    monkeypatch.setenv("GITHUB_PAT", "ghp_SENTINEL")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/.cache/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("TOKENIZER_MODEL", "/models/llama-tiny")
    monkeypatch.setenv("SORT_KEY", "created_at_then_id")
    monkeypatch.setenv("STOP_TOKEN", "128001128001128001")
    monkeypatch.setenv("AWS_SECRET", str(Path(__file__).parent))
    monkeypatch.setenv("GCP_CREDENTIALS", f"{Path(__file__).parent}/not_there.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://me:pass@host/x and s3://key@b", "https://***@host/x and s3://***@b"),
        ("hf://me/set?token=abc:train", "hf://me/set?token=***"),
        ("http://h/x?a=1&X-Amz-Signature=abc&b=2", "http://h/x?a=1&X-Amz-Signature=***&b=2"),
        (f"token={TOKEN}.", "token=***."),
        (f"key {KEY}{KEY}", "key ******"),
        (f"key {AWS_KEY[:12]} {AWS_KEY}", f"key {AWS_KEY[:12]} ***"),
        ("PGPASSWORD is SENTINEL password", "PGPASSWORD is ***"),
        ("SENTINEL of an account, ghp_SENTINEL", "***, ***"),
        (
            "http://h/x?access_token=abc&sig=d&key=e&x-api-key=f",
            "http://h/x?access_token=***&sig=***&key=***&x-api-key=***",
        ),
        ("hf://me:pass@set", "hf://***@set"),
        ("/home/me/.cache/token is false; hf_path=a, data.prompt_key=q", None),
        ("me@example.org: hf_short", None),
        ("/models/llama-tiny, created_at_then_id, 128001128001128001", None),
        (f"{Path(__file__).parent} and {Path(__file__).parent}/not_there.json", None),
        ("hf://imdb@main:train and hf://me/set@main", None),
        ("http://h/x?sort_key=a&monkey=3&design=4&partition-key=5", None),
        ("hf_llama_tiny_of_a_long_name_with_32k, hf_" + "a" * 40 + ", hf_" + "A" * 40, None),
    ],
)
def test_secrets_are_hidden_and_nothing_else(text: str, told: str | None) -> None:
    assert redact(text) == (text if told is None else told) == redact(redact(text))


WORDS = [
    f"data.train_path=hf://me/set?token={TOKEN}:train",
    "data.train_path=https://u:SENTINEL@h/[x",
    "data.train_pathx=https://u:SENTINEL@h/x",
    "data.train_path='https://h/x.jsonl?token=SENTINEL'",
    "data.train_path=${oc.env:WANDB_API_KEY}",
    f"train.max_steps={TOKEN}",
    f"token={TOKEN}",
    f"--token={TOKEN}",
    f"+model={KEY}",
]


@pytest.mark.parametrize("word", WORDS)
def test_refused_words_are_told_without_their_secrets(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(["+model=hf", word], check=check)
    assert "***" in str(caught.value)
    assert "SENTINEL" not in str(caught.value) + "".join(caught.value.violations)


@pytest.mark.parametrize("key", ["data.prompt_key", "model.name"])
def test_a_secret_of_the_environment_gets_into_no_setting(key: str) -> None:
    told = (
        rf"{key}=\*\*\*: must not hold what WANDB_API_KEY of the environment holds, .*another name than WANDB_API_KEY"
    )
    with pytest.raises(ConfigError, match=told):
        compose_config(["+model=hf", f"{key}=${{oc.env:WANDB_API_KEY}}"], check=check)


def test_credentials_of_a_url_get_into_no_setting() -> None:
    with pytest.raises(
        ConfigError, match=r"/\*\*\*@h/x: must not hold the credentials of a URL, nor others, .*~/\.netrc"
    ):
        compose_config(["+model=hf", "data.train_path=https://u:SENTINEL@h/x"], check=check)


def test_a_long_word_takes_no_longer_than_it_is_long() -> None:
    """A square of it would be an hour: of a row's role, or a name in a header."""
    begun = time.monotonic()
    for long in ("a" * 10**6, "?a-" * 10**5, "hf_" + "A" * 10**6, "a:/" * 10**5, "a@" * 10**5):
        assert redact(long) == long
    assert time.monotonic() - begun < 20


def test_a_secret_that_begins_like_another_leaves_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for first, second in (("A_TOKEN", "B_TOKEN"), ("B_TOKEN", "A_TOKEN")):
        monkeypatch.setenv(first, "abcdefghijklmnop")
        monkeypatch.setenv(second, "abcdefghijklmnop-and-the-rest")
        assert redact("abcdefghijklmnop-and-the-rest, abcdefghijklmnop") == "***, ***"
        monkeypatch.delenv(first)
        monkeypatch.delenv(second)


def test_what_libraries_say_is_told_without_secrets() -> None:
    with pytest.raises(DataError, match=r"token=\*\*\*") as caught:
        read_pairs(f"hf://me/set?token={TOKEN}:train")
    assert "SENTINEL" not in str(caught.value)


def test_the_log_has_no_secrets_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("megadpo")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    try:
        configure_logging()
        get_logger("megadpo.test").info("%s\tsays \x1b[31m\x9b%s\nend", KEY, TOKEN)
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    assert capsys.readouterr().err.endswith("***\tsays ␛[31m\ufffd***\nend\n")
