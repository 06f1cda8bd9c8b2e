"""What only a GPU can show: ``python -m tests.gpu``, on one CUDA device, without a network, in 8 minutes."""
