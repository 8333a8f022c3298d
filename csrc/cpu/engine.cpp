// Choice of instruction set and spreading of rows over threads.
#include "engine.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace kto {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables;
#ifdef KTO_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    tables.push_back(&kKernels_avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    tables.push_back(&kKernels_avx2);
#endif
  tables.push_back(&kKernels_baseline);
  return tables;
}

// Runs body(begin, end) over [0, n) on up to `threads` threads, in blocks handed out as threads
// come free. Threads live for one call: there is no pool to survive a fork, and starting one costs
// tens of microseconds against milliseconds of logits.
template <class Body>
void parallel_rows(int64_t n, int64_t bytes_per_row, int threads, const Body& body) {
  constexpr int64_t kBytesPerBlock = 1 << 20;
  const int64_t block = std::max<int64_t>(1, kBytesPerBlock / std::max<int64_t>(1, bytes_per_row));
  const int64_t blocks = (n + block - 1) / block;
  const int workers = int(std::min<int64_t>(threads, blocks));
  if (workers <= 1) {
    if (n > 0) body(0, n);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < blocks;)
      body(i * block, std::min(n, (i + 1) * block));
  };
  std::vector<std::thread> team;
  team.reserve(workers - 1);
  try {
    while (int(team.size()) < workers - 1) team.emplace_back(work);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started, and this one, do all the work.
  }
  work();
  for (auto& thread : team) thread.join();
}

int64_t bytes_per_row(const Rows& rows) { return rows.vocab * (rows.dtype == DType::f32 ? 4 : 2); }

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : available()) names.push_back(table->name);
  return names;
}

const Kernels& kernels() {
  const auto tables = available();
  const char* forced = getenv("KTO_KERNELS_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return *tables.front();
  std::string names;
  for (const Kernels* table : tables) {
    if (std::string(forced) == table->name) return *table;
    names += std::string(names.empty() ? "" : ", ") + table->name;
  }
  throw std::invalid_argument("KTO_KERNELS_CPU_ISA=" + std::string(forced) +
                              ": this machine and build have " + names);
}

void token_logps_forward(const Rows& rows, const Scale& scale, const RowOutputs& out, int threads) {
  const Kernels& table = kernels();
  parallel_rows(rows.n_rows, bytes_per_row(rows), threads, [&](int64_t begin, int64_t end) {
    table.forward(rows, scale, out, begin, end);
  });
}

void logits_backward(const Rows& rows, const Scale& scale, const Gradient& gradient,
                     const RowStatistics& statistics, const Output& output, int threads) {
  const Kernels& table = kernels();
  parallel_rows(rows.n_rows, bytes_per_row(rows), threads, [&](int64_t begin, int64_t end) {
    table.backward(rows, scale, gradient, statistics, output, begin, end);
  });
}

}  // namespace kto
