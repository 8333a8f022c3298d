// Choice of instruction set and spreading of rows over threads.
#include "engine.h"

#include <stdlib.h>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

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
  // Not every compiler knows "f16c"; every processor with AVX2 has it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    tables.push_back(&kKernels_avx2);
#endif
  tables.push_back(&kKernels_baseline);
  return tables;
}

#ifndef _WIN32
// A forked child has none of its parent's threads, and OpenMP would wait for them for ever.
bool forked = false;
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// The entry point of torch's OpenMP runtime, once find_openmp has found it. It is the stable one
// that GCC's, LLVM's and Intel's runtimes all export.
using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);
OpenMP openmp = nullptr;

// Runs work(argument) on `workers` threads at once, this one among them.
//
// torch's own OpenMP team does it where there is one: its idle threads spin for milliseconds after
// every torch operation, so a team of ours would share the cores with them.
void run_team(int workers, void (*work)(void*), void* argument) {
#ifndef _WIN32
  if (openmp != nullptr && !forked) return openmp(work, argument, unsigned(workers), 0);
#endif
  std::vector<std::thread> team;
  team.reserve(workers - 1);
  try {
    while (int(team.size()) < workers - 1) team.emplace_back(work, argument);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started, and this one, do all the work.
  }
  work(argument);
  for (auto& thread : team) thread.join();
}

// Runs body(begin, end) over [0, n) on up to `threads` threads, in blocks handed out as threads
// come free. Which thread takes a row does not change its bits.
template <class Body>
void parallel_rows(int64_t n, int64_t bytes_per_row, int threads, const Body& body) {
  constexpr int64_t kBytesPerBlock = 1 << 18;
  const int64_t block = std::max<int64_t>(1, kBytesPerBlock / std::max<int64_t>(1, bytes_per_row));
  const int64_t blocks = (n + block - 1) / block;
  const int workers = int(std::min<int64_t>(threads, blocks));
  if (workers <= 1) {
    if (n > 0) body(0, n);
    return;
  }
  struct Shared {
    const Body& body;
    int64_t n, block, blocks;
    std::atomic<int64_t> next{0};
  } shared{body, n, block, blocks};
  const auto work = [](void* argument) {
    Shared& shared = *static_cast<Shared*>(argument);
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.blocks;)
      shared.body(i * shared.block, std::min(shared.n, (i + 1) * shared.block));
  };
  run_team(workers, work, &shared);
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

std::string find_openmp([[maybe_unused]] const std::string& torch_library) {
#ifndef _WIN32
  constexpr const char* kEntry = "GOMP_parallel";
  void* entry = nullptr;
#ifndef __APPLE__
  // As the loader resolves torch's own calls: a preloaded or globally visible runtime comes first.
  // (macOS binds a call to one library, and its RTLD_DEFAULT is every library in the process.)
  entry = dlsym(RTLD_DEFAULT, kEntry);
#endif
  if (entry == nullptr) {
    // Then the libraries that torch itself was loaded with. Other packages may have brought
    // runtimes of their own into the process, whose names say nothing about who uses them.
    if (void* handle = dlopen(torch_library.c_str(), RTLD_LAZY | RTLD_NOLOAD))
      entry = dlsym(handle, kEntry);
  }
  openmp = reinterpret_cast<OpenMP>(entry);
  Dl_info info;
  if (entry != nullptr) return dladdr(entry, &info) ? info.dli_fname : "an unnamed library";
#endif
  return "";
}

void token_logps_forward(const Rows& rows, const Scale& scale, const RowStatistics& out,
                         int threads) {
  const Kernels& table = kernels();
  parallel_rows(rows.n_rows, bytes_per_row(rows), threads,
                [&](int64_t begin, int64_t end) { table.forward(rows, scale, out, begin, end); });
}

void logits_backward(const Rows& rows, const Scale& scale, const Gradient& gradient,
                     const RowStatistics& statistics, const Destination& output, int threads) {
  const Kernels& table = kernels();
  parallel_rows(rows.n_rows, bytes_per_row(rows), threads, [&](int64_t begin, int64_t end) {
    table.backward(rows, scale, gradient, statistics, output, begin, end);
  });
}

void score_chunk(const Rows& rows, const Scale& scale, const ChunkScores& out, void* gradient,
                 int threads) {
  const Kernels& table = kernels();
  parallel_rows(rows.n_rows, bytes_per_row(rows), threads, [&](int64_t begin, int64_t end) {
    table.chunk(rows, scale, out, gradient, begin, end);
  });
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));  // 4, 16 or 64 KB on ARM
  const uintptr_t begin = (uintptr_t(data) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace kto
