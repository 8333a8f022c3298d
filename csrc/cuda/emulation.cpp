// Launches of kernels.cuh's kernels on the host, one block after another, for tests without a GPU.
#include <algorithm>
#include <numeric>
#include <random>
#include <type_traits>

#include "kernels.cuh"

namespace kto {

// Seeds the order of blocks and threads; 0 leaves them in the order of their numbers.
unsigned emulation_seed = 0;

namespace {

constexpr int kThreads =
    64;  // more than one warp, and so few that small rows keep all of them busy

std::vector<int> order(int64_t count) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (emulation_seed != 0)
    std::shuffle(numbers.begin(), numbers.end(), std::mt19937(emulation_seed));
  return numbers;
}

template <class Body>
void run(int64_t blocks, Body&& body) {
  const std::vector<int> threads = order(kThreads);
  for (int index : order(blocks)) {
    Block<kThreads> block(unsigned(index), threads);
    body(block);
  }
}

}  // namespace

void launch_forward(const ForwardArguments& arguments, Target) {
  dispatch(arguments.sets[0].rows.dtype, arguments.scale.softcap, [&](auto codec, auto softcap) {
    run(std::max<int64_t>(1, arguments.n_rows) * arguments.splits, [&](Block<kThreads>& block) {
      forward<decltype(codec), decltype(softcap)::value>(block, arguments);
    });
  });
}

void launch_backward(const BackwardArguments& arguments, Target) {
  dispatch(arguments.rows.dtype, arguments.scale.softcap, [&](auto codec, auto softcap) {
    run(arguments.rows.n_rows * arguments.splits, [&](Block<kThreads>& block) {
      backward<decltype(codec), decltype(softcap)::value>(block, arguments);
    });
  });
}

void launch_chunk(const ChunkArguments& arguments, Target) {
  dispatch(arguments, [&](auto codec, auto softcap, auto outputs) {
    run(arguments.rows.n_rows, [&](Block<kThreads>& block) {
      chunk<decltype(codec), decltype(softcap)::value, decltype(outputs)::value>(block, arguments);
    });
  });
}

void launch_multiply(const MultiplyArguments& arguments, Target) {
  with_type(arguments.dtype, [&](auto codec) {
    run(arguments.blocks,
        [&](Block<kThreads>& block) { multiply<decltype(codec)>(block, arguments); });
  });
}

void launch_sequences(const SequencesArguments& arguments, Target) {
  run(1, [&](Block<kThreads>& block) { sequences(block, arguments); });
}

}  // namespace kto
