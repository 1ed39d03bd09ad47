"""Conversion of weights between Hugging Face, Megatron models and checkpoints.

families (tables) → mapping, stored (pure arithmetic) → safetensors_io, safetensors_writer, dcp (files), threads
→ load_save (models), streaming, compare (checkpoints).
"""
