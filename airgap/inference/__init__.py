"""The program inside the seal: loads one model, samples from it, and knows nothing else.

Empty on purpose: the broker imports `protocol` from here and must not load onnxruntime by that.
"""
