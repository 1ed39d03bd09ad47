"""From preference files to microbatches: dataset → tokenization → schedule → batch → loader."""
