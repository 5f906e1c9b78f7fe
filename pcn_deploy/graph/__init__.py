"""The two portable graphs of a bundle: TorchScript and typed ONNX with explicit Q/DQ."""
