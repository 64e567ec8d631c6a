"""Fine-tuned, pruned and quantized models."""
