#!/usr/bin/env python3
"""Shows pairs as training sees them: python tools/inspect_data.py +model=NAME data.train_path=F key=value ...

Counts what is kept, cut and dropped, draws the lengths, and decodes pairs with what is scored in colour. Of the model
directory only config.json and the tokenizer are read. Two words are this tool's own; the others are training's keys:
    pairs=N            pairs to decode, spread over the set (default 4)
    output=FILE.html   also write all of it as one page that needs no other file
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, whatever is installed

from megadpo.commands.command_line import run_tool
from megadpo.config.compose import compose_config, resolve_defaults
from megadpo.config.schema import Config
from megadpo.config.validation import validate
from megadpo.errors import ConfigError
from megadpo.runtime.files import writing
from megadpo.setup.model_source import model_source, resolve_model

CONFIG_DIR = Path(__file__).resolve().parents[1] / "conf"
_DEFAULT_PAIRS = 4


def main(arguments: list[str]) -> int:
    """Shows the data that the command line names; returns the exit status (0 done, 2 refused)."""
    if any(word in ("-h", "--help") for word in arguments):
        print(__doc__)
        return 0

    def inspect(logger: logging.Logger) -> int:
        config, pairs, output = read_words(arguments)
        with TemporaryDirectory(prefix="megadpo-tokens-") as scratch:
            # Without a named cache, no files are left behind.
            cached = replace(config, data=replace(config.data, cache_dir=config.data.cache_dir or scratch))
            show(resolve_defaults(resolve_model(cached), datetime.now()), pairs, output)
        if output is not None:
            logger.info("wrote %s", output)
        return 0

    return run_tool("inspect_data", inspect)


def read_words(arguments: list[str]) -> tuple[Config, int, Path | None]:
    """Parses configuration, number of pairs to decode, and page to write. Raises one ConfigError with all mistakes."""
    own = {key: value for key, _, value in (word.partition("=") for word in arguments) if key in ("pairs", "output")}
    problems = []
    pairs = own.get("pairs", str(_DEFAULT_PAIRS))
    if not pairs.isdecimal():
        problems.append(f"pairs={pairs}: must be a whole number >= 0, as in pairs={_DEFAULT_PAIRS}")
    output = Path(own["output"]) if "output" in own else None
    if output is not None and (output.suffix != ".html" or not output.parent.is_dir()):
        problems.append(f"output={output}: must name a .html file in an existing directory, as in output=data.html")
    words = [word for word in arguments if word.partition("=")[0] not in own]
    try:
        config = compose_config(words, config_dir=CONFIG_DIR, check=_check)
    except ConfigError as error:
        raise ConfigError([*problems, *error.violations]) from error
    if problems:
        raise ConfigError(problems)
    return config, int(pairs), output


def _check(config: Config) -> None:
    """Raises one ConfigError with all violations, for as many ranks as the layout needs, since none are started."""
    validate(config, world_size=max(1, config.parallel.tensor * config.parallel.pipeline))


def show(config: Config, pairs: int, output: Path | None) -> None:
    """Prints the report of a resolved configuration's data, and writes it as a page if one is requested."""
    # These take seconds to import; mistakes in the words cost none.
    from inspection.page import render_page
    from inspection.report import report_set
    from inspection.terminal import print_report

    from megadpo.data.tokenization import load_tokenizer
    from megadpo.models.hf_config import read_architecture
    from megadpo.setup.datasets import open_datasets, prepare_stores

    tokenizer_dir = model_source(config.model).hf_dir
    prepared = prepare_stores(config, tokenizer_dir)
    datasets = open_datasets(config, prepared, tokenizer_dir, read_architecture(tokenizer_dir).vocab_size)
    tokenizer = load_tokenizer(tokenizer_dir)
    data = config.data
    reports = [
        report_set(name, view, tokenizer, max_length=data.max_length, truncation=str(data.truncation), pairs=pairs)
        for name, view in datasets.views.items()
    ]
    print_report(reports, datasets.skipped_rows, Console())
    if output is not None:
        sources = [*data.train_path, *data.validation_files().values()]
        with writing(output):
            output.write_text(render_page(reports, datasets.skipped_rows, sources), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
