"""What benchmarks/compile_gates.py is made of: kernels compiled without a GPU, their machine code read and judged."""
