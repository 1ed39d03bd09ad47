"""Configuration: `schema` says what can be set, `compose` reads it, `validation` refuses what cannot run.

    config = compose_config(["+model=hf", "model.hf_path=DIR", "data.train_path=pairs.jsonl"])   # compose.py
    validate(config, world_size=8)                                                               # validation.py
    config = resolve_defaults(config, datetime.now())                                            # compose.py

Validate what the user wrote, then resolve: two checks (`train.resume`, `parallel.sequence_parallel`) look at what was
given, not at what was filled in.
"""
