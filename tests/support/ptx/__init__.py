"""Compiled kernels without a GPU: the PTX that Triton and nvcc make of the kernels, interpreted on the CPU.

The threads of several blocks run in random order, and every access to memory is checked: that it is inside a tensor,
aligned, of memory that was written, to memory that may be written, and free of data races; barriers and exchanges of
warps too. Results are compared with formulas in fp64.

launch.h, *.cpp, numbers.h, instructions.h   the interpreter
parser.py, translation.py, fusion.py         PTX text → the interpreter's instructions
memory.py, machine.py                        tensors as memory with a state for each byte; launches and findings
on_triton.py, on_cuda.py                     the backends' launches on that machine (cuda_launches.cpp)
exact.py, draws.py                           formulas in fp64; random tensors
operators.py, losses.py, sequences.py        random problems for every kernel
problems.py                                  which of them run
mutants.py                                   kernels with a fault, which must be found
process.py                                   a process in which Triton compiles
build.py                                     compiles, and keeps what it compiled
exploration.py, __main__.py                  thousands of problems: python -m tests.support.ptx
"""
