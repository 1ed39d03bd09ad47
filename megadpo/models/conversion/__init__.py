"""Weights between Hugging Face and Megatron: families (tables) → mapping (pure) → safetensors_io → load_save."""
