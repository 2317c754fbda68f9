"""Hugging Face folders as this project reads and writes them, with nothing of theirs imported.

families.py: config.json to `GPTConfig` and back, by a list of allowed keys. names.py: which of their tensors make which
of ours. reading.py: a folder that may come from a stranger. writing.py: safetensors shards as streams.
"""
