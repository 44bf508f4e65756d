"""The Hugging Face surface: levels on pretrained models, memory files, and where base models come from."""
