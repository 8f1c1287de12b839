"""The network alone: GPT, its kernels, its cache, its weights in other programs' names."""
