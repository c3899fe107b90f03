"""From a trained run to a bundle: everything an inference host needs, and no torch.

`bundle.py` (the manifest) and `session.py` (the ONNX Runtime scorer) import no torch; the other modules turn a
checkpoint into a bundle and do.
"""
