"""Files for runtimes: ONNX, and torch.export's."""
