"""`megakern convert`: Hugging Face folders, nanoGPT and llm.c checkpoints to runs, and runs to Hugging Face folders.

run.py is the way in. Weights go through in slices, everything is written into a temporary folder, proven there by
proof.py, and renamed at the end: there is a whole result that was checked, or none.
"""
