"""Files on disk without torch and llama.cpp: GGUF, Hugging Face directories, adapters."""
