"""What all kernels share: operators of torch, launches, block sizes, streams, overlap."""
