"""The model: its shape from a Hugging Face configuration, its layers, and its weights from and to Hugging Face."""
