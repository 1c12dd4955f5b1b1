"""The Llama model on prompt groups: fused layers, adapters, weights in and out, the tokenizer."""
