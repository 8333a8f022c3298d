// The kernels of kernels.cuh as GPU kernels, and their launches.
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.cuh"

namespace kto {
namespace {

constexpr int kThreads = 128;
// The chunk kernel reads each row twice, and finds it in L2 the second time if few rows are under
// way at once: hence few blocks of many threads. Two blocks share a multiprocessor, so that one
// reads while the other adds up.
constexpr int kChunkThreads = 384;
// How many blocks should fit on a multiprocessor, which limits the registers of each: a softcap's
// arithmetic needs more of them.
constexpr int blocks_wanted(bool softcap) { return softcap ? 6 : 8; }

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, blocks_wanted(kSoftcap))
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  Block<kThreads> block;
  forward<T, kSoftcap>(block, arguments);
}

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, blocks_wanted(kSoftcap))
    backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  Block<kThreads> block;
  backward<T, kSoftcap>(block, arguments);
}

template <class T, bool kSoftcap, bool kOutputs>
__global__ void __launch_bounds__(kChunkThreads, 2)
    chunk_kernel(const __grid_constant__ ChunkArguments arguments) {
  Block<kChunkThreads> block;
  chunk<T, kSoftcap, kOutputs>(block, arguments);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    multiply_kernel(const __grid_constant__ MultiplyArguments arguments) {
  Block<kThreads> block;
  multiply<T>(block, arguments);
}

__global__ void __launch_bounds__(kThreads)
    sequences_kernel(const __grid_constant__ SequencesArguments arguments) {
  Block<kThreads> block;
  sequences(block, arguments);
}

void check(const char* kernel, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("kto_kernels: CUDA kernel ") + kernel + ": " +
                           cudaGetErrorString(status));
}

template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks,
            Target target, int threads = kThreads) {
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string("kto_kernels: CUDA kernel ") + name + ": " +
                             std::to_string(blocks) + " rows are too many for one launch");
  // The caller has made the device current too, but in another copy of the CUDA runtime.
  check(name, cudaSetDevice(target.device));
  void* parameters[] = {const_cast<Arguments*>(&arguments)};
  const cudaError_t status = cudaLaunchKernel(
      reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)),
      parameters, 0, static_cast<cudaStream_t>(target.stream));
  check(name, status);
}

}  // namespace

void launch_forward(const ForwardArguments& arguments, Target target) {
  const int64_t rows = arguments.n_rows > 1 ? arguments.n_rows : 1;
  dispatch(arguments.sets[0].rows.dtype, arguments.scale.softcap, [&](auto codec, auto softcap) {
    launch("forward", forward_kernel<decltype(codec), decltype(softcap)::value>, arguments,
           rows * arguments.splits, target);
  });
}

void launch_backward(const BackwardArguments& arguments, Target target) {
  dispatch(arguments.rows.dtype, arguments.scale.softcap, [&](auto codec, auto softcap) {
    launch("backward", backward_kernel<decltype(codec), decltype(softcap)::value>, arguments,
           arguments.rows.n_rows * arguments.splits, target);
  });
}

void launch_chunk(const ChunkArguments& arguments, Target target) {
  dispatch(arguments, [&](auto codec, auto softcap, auto outputs) {
    launch("chunk",
           chunk_kernel<decltype(codec), decltype(softcap)::value, decltype(outputs)::value>,
           arguments, arguments.rows.n_rows, target, kChunkThreads);
  });
}

void launch_multiply(const MultiplyArguments& arguments, Target target) {
  with_type(arguments.dtype, [&](auto codec) {
    launch("multiply", multiply_kernel<decltype(codec)>, arguments, arguments.blocks, target);
  });
}

void launch_sequences(const SequencesArguments& arguments, Target target) {
  launch("sequences", sequences_kernel, arguments, 1, target);
}

}  // namespace kto
