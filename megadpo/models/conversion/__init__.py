"""Weights between Hugging Face, Megatron models and checkpoints: tables and pure arithmetic, files, whole conversions.

families (tables) → mapping, stored (pure) → safetensors_io, safetensors_writer, dcp (files), work (threads)
→ load_save (models), streaming, compare (checkpoints).
"""
