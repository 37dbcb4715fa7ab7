"""Files on disk, read and written without torch and without llama.cpp: GGUF, Hugging Face directories, adapters."""
