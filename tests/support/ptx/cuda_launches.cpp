// The launches of csrc/cuda/launch.h, which keep what a GPU would be given: bindings.cpp makes of
// this file a module with the interface of kto_kernels._cuda.
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"

namespace {

struct Kept {
  const char* kernel;
  int dtype, softcap, outputs;
  int64_t blocks, size;
  const void* arguments;
};

Kept kept;
std::vector<unsigned char> bytes;

template <class Arguments>
void keep(const char* kernel, kto::DType dtype, bool softcap, bool outputs, int64_t blocks,
          const Arguments& arguments) {
  static_assert(std::is_trivially_copyable_v<Arguments>);
  const auto* first = reinterpret_cast<const unsigned char*>(&arguments);
  bytes.assign(first, first + sizeof arguments);
  kept = {kernel, int(dtype), softcap, outputs, blocks, int64_t(bytes.size()), bytes.data()};
}

}  // namespace

namespace kto {

// Blocks as in kernels.cu.
void launch_forward(const ForwardArguments& a, Target) {
  const int64_t rows = a.n_rows > 1 ? a.n_rows : 1;
  keep("forward", a.sets[0].rows.dtype, a.scale.softcap, false, rows * a.splits, a);
}
void launch_backward(const BackwardArguments& a, Target) {
  keep("backward", a.rows.dtype, a.scale.softcap, false, a.rows.n_rows * a.splits, a);
}
void launch_chunk(const ChunkArguments& a, Target) {
  const bool outputs = a.entropy || a.mean_logits || a.is_top1;
  keep("chunk", a.rows.dtype, a.scale.softcap, outputs, a.rows.n_rows, a);
}
void launch_multiply(const MultiplyArguments& a, Target) {
  keep("multiply", a.dtype, false, false, a.blocks, a);
}
void launch_sequences(const SequencesArguments& a, Target) {
  keep("sequences", DType::f32, false, false, 1, a);
}

}  // namespace kto

extern "C" const Kept* last_launch() { return &kept; }
