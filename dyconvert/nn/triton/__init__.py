"""Dynamic convs by Triton kernels, on GPUs: `engine` calls what `kernels` computes.

Triton comes with torch's Linux builds. Nothing here imports it before a conv on a GPU asks for it.
"""
