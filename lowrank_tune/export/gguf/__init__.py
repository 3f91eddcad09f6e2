"""GGUF files: adapter, merged model, quantization."""
