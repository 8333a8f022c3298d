// The launches of csrc/cuda/launch.h, as in csrc/cuda/emulation.cpp, on the threads of threads.h.
#include <algorithm>
#include <type_traits>

#include "threads.h"

namespace kto {

unsigned emulation_seed = 0;  // chooses how many blocks run at once

namespace {

template <class Body>
void run(int64_t blocks, const Body& body) {
  const int beside = int(std::min<int64_t>(blocks, 2 + emulation_seed % 3));
  threads::launch<64>(blocks, beside, body);
}

}  // namespace

void launch_forward(const ForwardArguments& arguments, Target) {
  dispatch(arguments.sets[0].rows.dtype, arguments.scale.softcap, [&](auto codec, auto softcap) {
    run(std::max<int64_t>(1, arguments.n_rows) * arguments.splits,
        [&](auto& block) { forward<decltype(codec), decltype(softcap)::value>(block, arguments); });
  });
}

void launch_backward(const BackwardArguments& arguments, Target) {
  dispatch(arguments.rows.dtype, arguments.scale.softcap, [&](auto codec, auto softcap) {
    run(arguments.rows.n_rows * arguments.splits, [&](auto& block) {
      backward<decltype(codec), decltype(softcap)::value>(block, arguments);
    });
  });
}

void launch_chunk(const ChunkArguments& arguments, Target) {
  dispatch(arguments, [&](auto codec, auto softcap, auto outputs) {
    run(arguments.rows.n_rows, [&](auto& block) {
      chunk<decltype(codec), decltype(softcap)::value, decltype(outputs)::value>(block, arguments);
    });
  });
}

void launch_multiply(const MultiplyArguments& arguments, Target) {
  with_type(arguments.dtype, [&](auto codec) {
    run(arguments.blocks, [&](auto& block) { multiply<decltype(codec)>(block, arguments); });
  });
}

void launch_sequences(const SequencesArguments& arguments, Target) {
  run(1, [&](auto& block) { sequences(block, arguments); });
}

}  // namespace kto
