"""Tapes: what a CUDA graph is on a GPU, for a CPU. A function of no arguments is recorded once as
its list of tensor operations, which is then played without Python's, autograd's and views' costs.
"""
