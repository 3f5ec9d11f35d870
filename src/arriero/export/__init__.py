"""Models that run without torch and without the model's code.

`bundle`, `onnx_session` and `slot_runner` are what runs: they import NumPy and ONNX Runtime and nothing of the model. The
other files make a bundle.
"""
