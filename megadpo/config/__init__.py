"""Configuration: `schema` defines all keys, `compose` reads them, `validation` refuses configurations that can't run.

    config = compose_config(["+model=hf", "model.hf_path=DIR", "data.train_path=pairs.jsonl"])   # compose.py
    validate(config, world_size=8)                                                               # validation.py
    config = resolve_defaults(config, datetime.now())                                            # compose.py

Validate the user's configuration before resolving it: two checks (`train.resume`, `parallel.sequence_parallel`) need
the given values, without defaults filled in.
"""
